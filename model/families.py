"""The families of models that can run: a row says in what one differs from the others.

What a row does not name is shared: Mistral's layers, packing, batching, quantization, serving. A
new family is a row here, with golden values made by its authors' own code as its proof. Which row
a checkpoint belongs to, `model.detection` finds out. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from model.errors import PromptError
from model.prompts import NO_PROMPT, Example, Parts, Prompt, filled, joined, verbatim

Pooled = Literal["text", "all", "last"]
"""Which rows of a sequence go into its vector: those behind the prefix, all, the last one."""
Side = Literal["query", "passage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row: what the family's files look like, and what its forward is."""

    name: str
    model_type: str
    """Of config.json."""
    section: str | None = None
    """Where config.json has the backbone's numbers; None: at its top."""
    prefix: str = ""
    """What the checkpoint puts before the names that transformers' MistralModel has. Where it is
    empty, a checkpoint of the whole language model (`model.layers.…`) is read as well."""
    mask: Literal["full", "causal"]
    """causal: with the sliding window of config.json, as transformers applies it."""
    pooler: Literal["latent", "mean", "last"]
    left_out: Literal["instruction", "prefix", "nothing"]
    """What stays out of the pool, where the pooler takes more than one row. instruction: as many
    positions as the prefix has tokens, BOS not counted; prefix: BOS and the prefix."""
    keeps_eos: bool | None
    """Whether an input that was cut ends with EOS all the same; None: no input has EOS. BOS is
    id 1 and EOS id 2 in each."""
    template: str | None
    """The prefix of a text whose task is described by `{task}`; None: it takes no description."""
    query: str = ""
    """The prefix of a query without a description."""
    passage: str = ""
    suffix: str = ""
    """Behind a query."""
    example: str = ""
    """One of several before the prefix, of {instruction}, {query} and {response}."""
    byte_level: bool = False
    """Whether its models may have a tokenizer of bytes, with <s> and </s> as the others have."""
    markers: tuple[str, ...] = ()
    """Special tokens that templates write."""
    round_trip: bool = False
    """As in Prompt, of queries by template."""
    advised_tokens: int = 32_768
    """Of one input, unless the operator allows more: what the cards advise."""
    required: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    """Key of config.json -> the one value that the forward computes, and why."""
    demanded: Mapping[str, object] = field(default_factory=dict)
    """Key of config.json -> the value that must stand there."""

    @property
    def pooled(self) -> Pooled:
        if self.pooler == "last":
            return "last"
        return "all" if self.left_out == "nothing" else "text"

    def prompt(self, side: Side, instruction: str = "", examples: Sequence[Example] = ()) -> Prompt:
        """Around a text of that side, whose task is described by `instruction` ("": by nothing).

        Raises PromptError where this family has no place for what is given.
        """
        if examples and not self.example:
            raise PromptError("examples", f"a {self.name} model takes no examples")
        if examples and side == "passage":
            raise PromptError("examples", "examples are for queries, and these are passages")
        if instruction and self.template is None:
            raise self.only_takes_a_side("instruction")
        if side == "passage" and not instruction:
            return self.verbatim(self.passage)
        if instruction:
            assert self.template is not None
            short = len(instruction) <= _CACHED_CHARS  # clients send what they like
            describe = _described if short else _described.__wrapped__
            prefix = describe(self.template, self.markers, instruction)
        else:
            prefix = verbatim(self.query, self.markers)
        shown = [
            filled(
                verbatim(self.example, self.markers),
                instruction=example.instruction,
                query=example.query,
                response=example.response,
            )
            for example in examples
        ]
        suffix = verbatim(self.suffix, self.markers)
        return Prompt(prefix, suffix, joined(*shown), round_trip=self.round_trip)

    def only_takes_a_side(self, field: str) -> PromptError:
        """What refuses a `field` that describes a task."""
        return PromptError(
            field,
            f"a {self.name} model takes no {field}, only a side: input_type, or the model's "
            "-query and -passage names",
        )

    def verbatim(self, prefix: str, suffix: str = "") -> Prompt:
        """What a caller wrote: its markers are meant as such."""
        if not prefix and not suffix:
            return NO_PROMPT
        return Prompt(verbatim(prefix, self.markers), verbatim(suffix, self.markers))


_CACHED_CHARS = 2048


@lru_cache(maxsize=256)
def _described(template: str, markers: tuple[str, ...], task: str) -> Parts:
    """A server writes few of them over and over."""
    return filled(verbatim(template, markers), task=task)


NV_EMBED = Family(
    name="nv-embed",
    model_type="nvembed",
    section="text_config",
    prefix="embedding_model.",
    mask="full",
    pooler="latent",
    left_out="instruction",
    keeps_eos=False,
    template="Instruct: {task}\nQuery: ",
    required={
        "mask_type": ("b", "only bidirectional attention is supported"),
        "add_eos": (True, "EOS is always appended"),
        "is_mask_instruction": (True, "instructions always stay out of the pool"),
    },
)
E5_MISTRAL = Family(
    name="e5-mistral",
    model_type="mistral",
    mask="causal",
    pooler="last",
    left_out="nothing",
    keeps_eos=True,
    template="Instruct: {task}\nQuery: ",
    advised_tokens=4096,
)
GRITLM = Family(
    name="gritlm",
    model_type="mistral",
    mask="full",
    pooler="mean",
    left_out="prefix",
    keeps_eos=None,
    template="<|user|>\n{task}\n<|embed|>\n",
    query="<|embed|>\n",
    passage="<|embed|>\n",
    advised_tokens=4096,
)
BGE_EN_ICL = Family(
    name="bge-en-icl",
    model_type="mistral",
    mask="causal",
    pooler="last",
    left_out="nothing",
    keeps_eos=True,
    template="<instruct>{task}\n<query>",
    suffix="\n<response>",
    example="<instruct>{instruction}\n<query>{query}\n<response>{response}\n\n",
    markers=("<instruct>", "<query>", "<response>"),
    round_trip=True,
    advised_tokens=4096,
)
BIDIRECTIONAL_MEAN = Family(
    name="bidirectional-mean",
    model_type="mistral",
    mask="full",
    pooler="mean",
    left_out="nothing",
    keeps_eos=None,
    byte_level=True,
    template=None,
    query="query: ",
    passage="passage: ",
    advised_tokens=4096,
)
NEMOTRON_3_EMBED = Family(
    name="nemotron-3-embed",
    model_type="ministral3",
    mask="full",
    pooler="mean",
    left_out="nothing",
    keeps_eos=None,
    byte_level=True,
    template=None,
    query="query: ",
    passage="passage: ",
    advised_tokens=4096,
    demanded={"is_causal": False},
)
FAMILIES: list[Family] = [
    NV_EMBED,
    E5_MISTRAL,
    GRITLM,
    BGE_EN_ICL,
    BIDIRECTIONAL_MEAN,
    NEMOTRON_3_EMBED,
]
"""Each name once."""


def known_families() -> list[str]:
    return [family.name for family in FAMILIES]
