"""The mapped shards of a checkpoint: which tensors there are, and rows of them on demand.

Mapped, never read whole. Owns the check that the tensors are those of a config, and that what is
read is finite; knows nothing of the model that they make.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.errors import CheckpointError
from model.files import listed
from model.weights.headers import weight_files
from model.weights.names import expected_shapes

_WHOLE = "model."
"""Before the names of a language model's trunk, as MistralForCausalLM has them."""
_HEAD = "lm_head.weight"
"""What such a checkpoint predicts words with: not read."""


class Checkpoint:
    """The mapped shards of one folder: names, shapes, and rows of tensors on demand."""

    def __init__(self, folder: Path) -> None:
        self.before = ""  # the names in the family's layout; `check` finds it
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for weights in weight_files(folder):
            try:
                shard = safe_open(str(weights.path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{weights.path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(weights.tensors, shard)
            self._shapes |= {name: tensor.shape for name, tensor in weights.tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the names of the family's layout, as far as `check` has found them."""
        return {name.removeprefix(self.before): shape for name, shape in self._shapes.items()}

    def check(self, config: ModelConfig) -> None:
        """Find the family's tensors, also where they are those of a whole language model. Raise
        CheckpointError naming what is missing, surplus or of another shape."""
        if not config.family.prefix and f"{_WHOLE}norm.weight" in self._shapes:
            self.before = _WHOLE
            self._shapes.pop(_HEAD, None)
        check_shapes(expected_shapes(config), self.shapes(), f"a {config.family.name} model")

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, on the host, in the checkpoint's dtype.

        Raises CheckpointError when one of their numbers is NaN or infinity."""
        name = self.before + name
        if start == 0 and stop is None:
            return _finite(name, self._files[name].get_tensor(name))
        return _finite(name, self._files[name].get_slice(name)[start:stop])

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """As `rows`."""
        name = self.before + name
        return _finite(name, self._files[name].get_slice(name)[:, start:stop])


def _finite(name: str, values: Tensor) -> Tensor:
    """`values`, of which none is NaN or infinity (either end of their range would be, too)."""
    if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged")
    return values


def check_shapes(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], kind: str
) -> None:
    """Raise CheckpointError naming what is missing, surplus or of another shape."""
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing: {listed(missing)}")
    if surplus := found.keys() - expected.keys():
        problems.append(f"surplus: {listed(surplus)}")
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ][:10]
    if problems:
        raise CheckpointError(
            f"the tensors are not those of {kind} of this config: " + "; ".join(problems)
        )
