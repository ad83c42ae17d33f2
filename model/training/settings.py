"""Every choice of a training run, read from one JSON file. Stage 1 and stage 2 are values of it.

A run without `data` only distils. Relative paths start at the settings file.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import ModelError


class TrainingSettingsError(ModelError):
    """The settings of a run are unknown, malformed or contradict one another."""


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The defaults are those of a small model on a CPU; the paper's recipe where it states one."""

    model: str  # the checkpoint folder to start from
    steps: int
    data: dict[str, float] = dataclasses.field(default_factory=dict)
    """JSON lines of examples -> how many times each line is seen for once of the others."""
    stage: int = 1
    """1: in-batch negatives on. 2: off, hard negatives only."""
    pairs_per_step: int = 64
    max_negatives: int = 7
    """Hard negatives of a query, drawn anew each time; the paper's 7."""
    temperature: float = 0.05
    contrastive_weight: float = 1.0
    texts: str | None = None
    """JSON lines of texts for distillation, whose vectors are in `vectors`."""
    vectors: str | None = None
    projection: str | None = None
    first_text: int = 0
    last_text: int | None = None
    texts_per_step: int = 0
    distillation_weight: float = 1.0
    pooling: str = "latent"
    """latent, mean or eos. Only latent and bidirectional is exported; the rest is ablation."""
    causal: bool = False
    max_tokens: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay: float = 0.2
    """The part of the steps, at the end, over which the learning rate falls to zero."""
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    seed: int = 1
    dtype: str = "auto"  # auto, float32 or bfloat16 (autocast; the weights stay float32)
    threads: int | None = None
    save_every: int = 500
    validate_every: int = 500
    validation_rows: int = 500
    """At most so many held-out rows of each kind are measured; see `examples.is_held_out`."""

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise TrainingSettingsError(f"stage is {self.stage}, not 1 or 2")
        if self.data and self.pairs_per_step < 2:
            raise TrainingSettingsError("data need pairs_per_step of at least 2")
        if self.texts_per_step and not self.texts:
            raise TrainingSettingsError("texts_per_step needs texts")
        if self.texts and not (self.vectors and self.projection):
            raise TrainingSettingsError("texts need vectors and a projection")
        if not self.data and not self.texts_per_step:
            raise TrainingSettingsError("neither data nor texts_per_step: nothing to learn")
        if self.pooling not in ("latent", "mean", "eos"):
            raise TrainingSettingsError(f"pooling is {self.pooling!r}; latent, mean or eos")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise TrainingSettingsError(f"dtype is {self.dtype!r}; auto, float32 or bfloat16")
        if self.steps < 1 or self.save_every < 1 or self.validate_every < 1:
            raise TrainingSettingsError("steps, save_every and validate_every are at least 1")

    @property
    def servable(self) -> bool:
        """Whether the outcome is an NV-Embed."""
        return self.pooling == "latent" and not self.causal

    @property
    def in_batch_negatives(self) -> bool:
        return self.stage == 1

    @classmethod
    def read(cls, path: Path, base: Path | None = None, **changes: Any) -> TrainingSettings:
        """From a JSON file; its relative paths start at `base`, by default the file's folder."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrainingSettingsError(f"{path} cannot be read: {error}") from error
        if not isinstance(raw, dict):
            raise TrainingSettingsError(f"{path}: not a JSON object")
        return cls.of(raw | changes, path, path.parent if base is None else base)

    @classmethod
    def of(cls, raw: dict[str, Any], path: Path, base: Path) -> TrainingSettings:
        """From the object that `path` held; relative paths in it start at `base`."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := raw.keys() - known:
            raise TrainingSettingsError(f"{path}: unknown {', '.join(sorted(unknown))}")
        raw = dict(raw)
        for key in ("model", "texts", "vectors", "projection"):
            if raw.get(key):
                raw[key] = str(base / raw[key])
        if isinstance(raw.get("data"), dict):
            raw["data"] = {str(base / name): weight for name, weight in raw["data"].items()}
        try:
            return cls(**raw)
        except TypeError as error:
            raise TrainingSettingsError(f"{path}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
