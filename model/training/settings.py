"""Every choice of a training run, read from one JSON file. Stage 1 and stage 2 are values of it.

A run without `data` distils, or learns from scored pairs alone. Relative paths start at the
settings file. Values that make no sense, alone or together, are refused before anything is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import FileError, ModelError, did_you_mean
from model.families import known_families
from model.files import without_repetition
from model.hub import packaged_checkpoint
from model.user_files import read_text


class TrainingSettingsError(ModelError):
    """The settings of a run are unknown, malformed or contradict one another."""


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a text"),
    "dict[str, float]": (dict, "an object"),
    "list[int]": (list, "a list of whole numbers"),
}
_MOST = 2**31 - 1
_RANGES: dict[str, tuple[float, float]] = {
    "threads": (1, 1024),  # OpenMP ends the process with too many
    **dict.fromkeys(("steps", "save_every", "validate_every", "pairs_per_step"), (1, _MOST)),
    **dict.fromkeys(("lora_rank", "tokens_per_pass"), (1, _MOST)),
    **dict.fromkeys(("num_latents", "num_cross_heads", "cross_dim_head"), (1, _MOST)),
    **dict.fromkeys(("max_negatives", "texts_per_step", "validation_rows"), (0, _MOST)),
    "scored_per_step": (0, _MOST),
    **dict.fromkeys(("first_text", "last_text", "warmup_steps", "seed"), (0, _MOST)),
    **dict.fromkeys(("weight_decay", "contrastive_weight", "distillation_weight"), (0, 1e9)),
    **dict.fromkeys(("false_negatives", "soft_label_weight", "word_weight"), (0, 1e9)),
    "scored_weight": (0, 1e9),
    **dict.fromkeys(("decay", "lora_dropout", "other_case", "instructed"), (0, 1)),
    "max_tokens": (3, 32_768),  # BOS, a piece, EOS; the model's longest
}
_ABOVE_ZERO = ("temperature", "learning_rate", "max_gradient_norm", "lora_alpha")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The defaults are those of a small model on a CPU; the paper's recipe where it states one."""

    model: str
    """The checkpoint folder to start from: of a family (docs/families.md), or transformers'
    Mistral, which becomes an NV-Embed. The shipped model goes by its name, nv-embed-small."""
    steps: int
    family: str = "auto"
    """The start's, as of `nv-embed serve`; auto: as its files say. nv-embed: a Mistral gets a new
    pooler, also where its files say another family."""
    data: dict[str, float] = dataclasses.field(default_factory=dict)
    """JSON lines of examples -> how many times each line is seen for once of the others."""
    stage: int = 1
    """1: in-batch negatives on. 2: off, hard negatives only."""
    pairs_per_step: int = 64
    max_negatives: int = 7
    """Hard negatives of a query, drawn anew each time; the paper's 7."""
    temperature: float = 0.05
    contrastive_weight: float = 1.0
    false_negatives: float | None = None
    """In stage 1 another query's text whose teacher's cosine to a query is above so many times the
    own positive's is no negative of it; `mine` takes 0.95. None: all are."""
    soft_label_weight: float = 0.0
    """Of how far the learner's softmax over the step's positives and negatives is from the
    teacher's, where that knows query and text."""
    scored: str | None = None
    """JSON lines of scored pairs: the more alike people find two texts, the nearer they get."""
    scored_per_step: int = 0
    scored_weight: float = 1.0
    texts: str | None = None
    """JSON lines of texts for distillation, whose vectors are in `vectors`."""
    vectors: str | None = None
    projection: str | None = None
    """From the vectors' width to the model's; None: they have it, as those of a larger checkpoint
    that the model was pruned from."""
    words: str | None = None
    """The teacher's states of the texts' words (`words.py`), learnt beside the vectors."""
    word_weight: float = 0.5
    first_text: int = 0
    last_text: int | None = None
    texts_per_step: int = 0
    distillation_weight: float = 1.0
    instructed: float = 0.0
    """The part of the drawn texts that are read as queries, each behind the instruction of some
    task that servers know (model/tasks.py), for the same vector: the teacher knows none, and what
    was never read behind one is embedded worse there."""
    other_case: float = 0.0
    """The part of all texts that are read in another case each time (`case.recased`). For a
    teacher that lower-cases: its vector is taken for theirs, too."""
    matryoshka_dimensions: list[int] | None = None
    """Each loss is the mean of that of whole vectors and of their first so many numbers, made to
    length 1 (Kusupati et al. 2022). They go into config.json, and servers offer them."""
    pooling: str = "latent"
    """latent, mean or eos, of an NV-Embed; other families have their own. Only latent and
    bidirectional is exported; the rest is ablation."""
    causal: bool = False
    max_tokens: int = 128
    tokens_per_pass: int | None = None
    """Gradient caching: the graphs of so many tokens are in memory at once, at the price of a
    second forward. None: the whole step's."""
    lora_rank: int | None = None
    """Adapters of this rank on the backbone's projections, whose own weights are frozen; the
    pooler is trained whole. The paper's 16. None: everything is trained."""
    lora_alpha: float = 32.0
    lora_dropout: float = 0.1
    num_latents: int | None = None
    """The new pooler's, for a Mistral to start from; None: in proportion to the paper's."""
    num_cross_heads: int | None = None
    cross_dim_head: int | None = None
    optimizer: str = "adamw"
    """adamw, or muon: Muon for the matrices of the backbone's layers, AdamW for all else."""
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay: float = 0.2
    """The part of the steps, at the end, over which the learning rate falls to zero."""
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    seed: int = 1
    dtype: str = "auto"
    """auto, float32 or bfloat16: autocast. What is trained stays float32; the matrices that LoRA
    freezes are kept in bfloat16, too."""
    compile: bool = False
    """Compile what stands between the matrix products (`compiled`): a third faster on a CPU, once
    half a minute has gone. Needs a C++ compiler."""
    threads: int | None = None
    """CPU threads. The one setting that may change while a run is resumed, though not to the
    last digit."""
    save_every: int = 500
    validate_every: int = 500
    validation_rows: int = 500
    """At most so many held-out rows of each kind are measured; see `examples.is_held_out`."""
    name: str | None = None
    """The id of what comes out, as a server shows it; None: the start's (a plain Mistral's, with
    -embed behind it)."""
    export_dtype: str = "float16"
    """float16, as the official weights are, bfloat16 or float32."""

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_ranges()
        if self.stage not in (1, 2):
            raise TrainingSettingsError(f"stage is {self.stage}, not 1 or 2")
        if self.data and self.pairs_per_step < 2:
            raise TrainingSettingsError("data need pairs_per_step of at least 2")
        if self.texts_per_step and not self.texts:
            raise TrainingSettingsError("texts_per_step needs texts")
        if bool(self.scored_per_step) != bool(self.scored):
            raise TrainingSettingsError("scored and scored_per_step need one another")
        if self.instructed and not self.texts_per_step:
            raise TrainingSettingsError("instructed, a part of the texts, needs texts_per_step")
        if self.scored_per_step == 1:
            raise TrainingSettingsError("scored_per_step is 1: scores are compared, so 2 or more")
        if self.words and not (self.texts and self.projection):
            raise TrainingSettingsError("words needs texts and a projection")
        if self.words and self.tokens_per_pass:
            raise TrainingSettingsError("words are learnt with whole steps: no tokens_per_pass")
        if self.texts and not self.vectors:
            raise TrainingSettingsError("texts need vectors")
        if not (self.data or self.texts_per_step or self.scored_per_step):
            raise TrainingSettingsError("no data, texts_per_step or scored: nothing to learn")
        if self.family not in (known := ["auto", *known_families()]):
            hint = did_you_mean(self.family, known)
            raise TrainingSettingsError(f"family is {self.family!r}, not {', '.join(known)}{hint}")
        if self.pooling not in ("latent", "mean", "eos"):
            raise TrainingSettingsError(f"pooling is {self.pooling!r}; latent, mean or eos")
        if self.stage == 2 and self.data and not self.max_negatives:
            raise TrainingSettingsError("stage 2 learns from hard negatives: max_negatives is 0")
        if self.optimizer not in ("adamw", "muon"):
            raise TrainingSettingsError(f"optimizer is {self.optimizer!r}; adamw or muon")
        if self.optimizer == "muon" and self.lora_rank:
            raise TrainingSettingsError("muon trains the layers' matrices, which lora_rank freezes")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise TrainingSettingsError(f"dtype is {self.dtype!r}; auto, float32 or bfloat16")
        if self.soft_label_weight and not self.texts:
            raise TrainingSettingsError("soft_label_weight needs texts: the teacher's vectors")
        if self.false_negatives is not None and not (self.texts and self.in_batch_negatives):
            raise TrainingSettingsError("false_negatives needs texts, and stage 1")
        widths = self.matryoshka_dimensions or []
        if not all(type(width) is int and width > 0 for width in widths):
            raise TrainingSettingsError(f"matryoshka_dimensions is {widths}, not numbers above 0")
        if self.export_dtype not in ("float16", "bfloat16", "float32"):
            raise TrainingSettingsError(
                f"export_dtype is {self.export_dtype!r}; float16, bfloat16 or float32"
            )

    def _check_kinds(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            expected = _KINDS.get(kind.removesuffix(" | None"))
            if expected is None or (value is None and kind.endswith("None")):
                continue
            if not isinstance(value, expected[0]) or (isinstance(value, bool) and kind != "bool"):
                raise TrainingSettingsError(f"{field.name} is {value!r}, not {expected[1]}")

    def _check_ranges(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bound = f"at least {low:g}" if value < low else f"at most {high:g}"
                raise TrainingSettingsError(f"{name} is {value}, it is {bound}")
        for name in _ABOVE_ZERO:
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingSettingsError(f"{name} is {getattr(self, name)}, it is above 0")
        for name, weight in self.data.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not number or not 0 < weight < math.inf:
                raise TrainingSettingsError(f"the weight of {name} is {weight!r}, not above 0")
        if self.lora_dropout >= 1:
            raise TrainingSettingsError("lora_dropout is below 1: all would be dropped")
        if self.last_text is not None and self.last_text <= self.first_text:
            raise TrainingSettingsError(
                f"last_text is {self.last_text}, not behind first_text, {self.first_text}"
            )

    @property
    def servable(self) -> bool:
        """Whether the outcome is a model of a family."""
        return self.pooling == "latent" and not self.causal

    @property
    def in_batch_negatives(self) -> bool:
        return self.stage == 1

    @classmethod
    def read(cls, path: Path, base: Path | None = None, **changes: Any) -> TrainingSettings:
        """From a JSON file; its relative paths start at `base`, by default the file's folder."""
        try:
            raw = json.loads(read_text(path), object_pairs_hook=without_repetition)
        except (OSError, ValueError, FileError) as error:
            raise TrainingSettingsError(f"{path} cannot be read: {error}") from error
        except RecursionError:
            raise TrainingSettingsError(f"{path} is nested too deeply") from None
        if not isinstance(raw, dict):
            raise TrainingSettingsError(f"{path}: not a JSON object")
        return cls.of(raw | changes, path, path.parent if base is None else base)

    @classmethod
    def of(cls, raw: dict[str, Any], path: Path, base: Path) -> TrainingSettings:
        """From the object that `path` held; relative paths in it start at `base`."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(raw.keys() - known):
            hint = did_you_mean(unknown[0], known)
            raise TrainingSettingsError(f"{path}: unknown {', '.join(unknown)}{hint}")
        raw = dict(raw)
        for key in ("model", "scored", "texts", "vectors", "projection", "words"):
            value = raw.get(key)
            if value is not None and (not isinstance(value, str) or not value.strip("\0 ")):
                raise TrainingSettingsError(f"{path}: {key} is {value!r}, not a path")
            if value is not None:
                raw[key] = str(base / value)
        shipped = packaged_checkpoint()
        if raw.get("model") == str(base / shipped.name) and not Path(raw["model"]).exists():
            raw["model"] = str(shipped)  # by the name that a server shows
        if isinstance(raw.get("data"), dict):
            raw["data"] = {str(base / name): weight for name, weight in raw["data"].items()}
        try:
            return cls(**raw)
        except TypeError as error:
            raise TrainingSettingsError(f"{path}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that have a default, as JSON."""
        return {
            field.name: field.default
            for field in dataclasses.fields(cls)
            if field.default is not dataclasses.MISSING
        }
