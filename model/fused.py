"""What lies between the matrix products on a GPU, one kernel for each run of operations.

torch runs add + RMSNorm, SiLU·up, rotary and the quantizing to float8 as 2 to 7 operations each,
every one over memory: that is what a GPU spends its time on beside the products. `Fused` is
`model.operations` with one kernel for each, and what `choose` gives by name; without it the model
runs torch's own ("plain"). The kernels are behind `Launch`, so that something else can stand in for
them where there is no GPU: model.triton_kernels has them.

Knows which numbers a kernel reads and writes, not how. Letters: T rows, D width, I the MLP's
width, E head width.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.errors import UnsupportedError
from model.linear.quantization import ScaledRows
from model.operations import Product
from model.rotary import HalvesRotary, Rotary


class Launch(Protocol):
    """Runs a kernel of model.triton_kernels, or what stands in for it."""

    def __call__(self, kernel: str, programs: int, *args: Any, **constants: Any) -> None:
        """kernel: its name; args, constants: its parameters, all but the sizes of its blocks."""
        ...


@dataclass(frozen=True, slots=True)
class Fused:
    """The kernels as functions of tensors. Whatever is given has its numbers of a row next to one
    another; the rows themselves may lie apart. All compute in float32 and round once."""

    launch: Launch

    def residual(self, embedded: Tensor) -> Tensor:
        return embedded

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> Tensor | ScaledRows:
        """x [T, D] -> x / rms(x) * weight."""
        return self._norm(x, None, weight, eps, float8)

    def add_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> tuple[Tensor, Tensor | ScaledRows]:
        """residual [T, D] += update; -> (it, residual / rms(residual) * weight)."""
        return residual, self._norm(residual, update, weight, eps, float8)

    def _norm(
        self, residual: Tensor, update: Tensor | None, weight: Tensor, eps: float, float8: bool
    ) -> Tensor | ScaledRows:
        rows, width = residual.shape
        values, scales = _outputs(residual, width, _stored(weight, float8))
        added = residual if update is None else update
        self.launch(
            "add_norm", rows, residual, added, weight, values, scales, residual.stride(0),
            added.stride(0), width, eps, add=update is not None, float8=float8,
        )  # fmt: skip
        return ScaledRows(values, scales) if float8 else values

    def mlp(
        self, x: Tensor | ScaledRows, gate_up: Product, down: Product, *, float8: bool = False
    ) -> Tensor:
        """x [T, D] -> [T, D]."""
        return down(self.silu_up(gate_up(x), float8=float8))

    def silu_up(self, gate_up: Tensor, *, float8: bool) -> Tensor | ScaledRows:
        """gate_up [T, 2 * I] -> silu(gate) * up [T, I]."""
        width = gate_up.shape[1] // 2
        values, scales = _outputs(gate_up, width, _stored(gate_up, float8))
        self.launch(
            "silu_up", len(gate_up), gate_up, values, scales, gate_up.stride(0), width,
            float8=float8,
        )  # fmt: skip
        return ScaledRows(values, scales) if float8 else values

    def to_float8(self, x: Tensor) -> ScaledRows:
        """x [T, I] as float8 rows, each by its own largest number."""
        rows, width = x.shape
        values, scales = _outputs(x, width, torch.float8_e4m3fn)
        self.launch("to_float8", rows, x, values, scales, x.stride(0), width)
        return ScaledRows(values, scales)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [T, heads, E], turned in place by cos and sin [T, 1, E / 2]."""
        rows, heads, width = x.shape
        self.launch("rotate", rows, x, cos, sin, x.stride(0), x.stride(1), heads, width // 2)
        return x

    @property
    def rotary(self) -> type[Rotary]:
        """The layout of angles whose `rotate` is this one's."""
        rotate = self.rotate

        class FusedRotary(HalvesRotary):
            __slots__ = ()

            def rotate(self, x: Tensor) -> Tensor:
                return rotate(x, self.cos, self.sin)

        return FusedRotary


def _stored(like: Tensor, float8: bool) -> torch.dtype:
    return torch.float8_e4m3fn if float8 else like.dtype


def _outputs(x: Tensor, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for as many rows as x has: values [T, width] and, for float8, scales [T, 1]. Else
    there are none, and the kernels do not touch what stands in their place."""
    assert x.stride(-1) == 1, x.stride()
    values = x.new_empty(len(x), width, dtype=dtype)
    if dtype != torch.float8_e4m3fn:
        return values, values
    return values, x.new_empty(len(x), 1, dtype=torch.float32)


def _load_triton() -> Launch:
    launch: Launch = importlib.import_module("model.triton_kernels").launch
    return launch


def _triton_refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "it runs on CUDA only"
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "triton needs a C compiler: gcc or clang"
    return None


LAUNCHES: dict[str, tuple[Callable[[], Launch], Callable[[torch.device], str | None]]] = {
    "triton": (_load_triton, _triton_refusal),
}
"""Name -> how to load it, and the reason why it cannot run there, or None."""
NAMES = ("plain", *LAUNCHES)


def choose(name: str, device: torch.device) -> Fused | None:
    """The kernels of that name; None: torch's own operations.

    Raises UnsupportedError when they cannot run there.
    """
    if name == "plain":
        return None
    if name not in LAUNCHES:
        raise UnsupportedError(f"unknown fused kernels {name!r}; known: {', '.join(NAMES)}")
    load, why_not = LAUNCHES[name]
    if reason := why_not(device):
        raise UnsupportedError(f"fused kernels {name!r} cannot be used on {device}: {reason}")
    return Fused(load())
