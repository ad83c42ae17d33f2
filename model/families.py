"""The families of models that can run: a row says in what one differs from the others.

What a row does not name is shared: Mistral's layers, packing, batching, quantization, serving. A
new family is a row here, with golden values made by its authors' own code as its proof. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.errors import CheckpointError
from model.files import shown

Pooled = Literal["text", "all", "last"]
"""Which rows of a sequence go into its vector: those behind the instruction, all, the last one."""


@dataclass(frozen=True, slots=True)
class Family:
    """One row: how to recognise the family, and what its forward is."""

    name: str
    model_type: str
    """Of config.json: by it the family is recognised."""
    section: str | None
    """Where config.json has the backbone's numbers; None: at its top."""
    prefix: str
    """What the checkpoint puts before the names that transformers' MistralModel has."""
    mask: Literal["full", "causal"]
    pooler: Literal["latent", "mean", "last"]
    left_out: Literal["instruction", "nothing"]
    """What stays out of the pool, where the pooler takes more than one row."""
    keeps_eos: bool
    """Whether a truncated input ends with EOS all the same. BOS is id 1 and EOS id 2 in each."""
    template: str
    """The prefix that a task description becomes, in place of `{task}`."""
    required: Mapping[str, tuple[object, str]] = field(default_factory=dict)
    """Key of config.json -> the one value that the forward computes, and why."""

    @property
    def pooled(self) -> Pooled:
        if self.pooler == "last":
            return "last"
        return "text" if self.left_out == "instruction" else "all"


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
FAMILIES: list[Family] = [NV_EMBED]
"""Each `model_type` once."""


def family_of(raw: Any) -> Family:
    """The row that the parsed config.json belongs to. Raises CheckpointError, with those known."""
    kind = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    for family in FAMILIES:
        if isinstance(raw, dict) and family.model_type == kind:
            return family
    known = ", ".join(repr(family.model_type) for family in FAMILIES)
    raise CheckpointError(f"model_type is {shown(kind)}, this server runs {known} only")
