"""What lies between the matrix products of a layer, in the ways that different uses want.

Beside the products time goes into memory traffic. So what serves overwrites what is not needed any
more: the residual by its sum with an update, and on a CPU the update by the normed sum. There the
residual is kept in float32, which spares the norms two passes. Training overwrites nothing: each of
those values has a gradient to give. On a GPU `model.fused` has the same as one kernel each.

Knows no layer and no batch; who loads a model hands one of these to its backbone.
Shapes: T rows, D width, I the MLP's width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear.quantization import ScaledRows
from model.rotary import HalvesRotary, InPlaceRotary, NeighboursRotary, Rotary

_ROWS_AT_A_TIME = 256
"""On a CPU: what one operation leaves is in the cache for the next."""

Product = Callable[..., Tensor]


class Operations(Protocol):
    """float8: whether the product that follows takes float8 rows; only fused kernels make them."""

    @property
    def rotary(self) -> type[Rotary]: ...

    def residual(self, embedded: Tensor) -> Tensor:
        """Embeddings [T, D] as the residual that is kept."""
        ...

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> Tensor | ScaledRows:
        """x [T, D] -> x / rms(x) * weight."""
        ...

    def add_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> tuple[Tensor, Tensor | ScaledRows]:
        """-> (residual + update, the same normed in weight's dtype)."""
        ...

    def mlp(
        self, x: Tensor | ScaledRows, gate_up: Product, down: Product, *, float8: bool = False
    ) -> Tensor:
        """x [T, D] -> down(silu(gate) * up) [T, D], gate and up [T, I] in one product."""
        ...


class Differentiable:
    """For training: nothing is overwritten."""

    rotary: type[Rotary] = HalvesRotary

    def residual(self, embedded: Tensor) -> Tensor:
        return embedded

    def norm(self, x: Tensor, weight: Tensor, eps: float, *, float8: bool = False) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> tuple[Tensor, Tensor]:
        residual = residual + update
        return residual, self.norm(residual, weight, eps)

    def mlp(
        self, x: Tensor | ScaledRows, gate_up: Product, down: Product, *, float8: bool = False
    ) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * up)


class InPlace(Differentiable):
    """For inference on a GPU, whose memory is scarce."""

    rotary = InPlaceRotary

    def add_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> tuple[Tensor, Tensor]:
        residual.add_(update)
        return residual, self.norm(residual, weight, eps)

    def mlp(
        self, x: Tensor | ScaledRows, gate_up: Product, down: Product, *, float8: bool = False
    ) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        return down(F.silu(gate, inplace=True).mul_(up))


class OnCpu(Differentiable):
    """For inference on a CPU, where rms_norm is a row of operations, each over all of x."""

    rotary = NeighboursRotary

    def __init__(self, *, mlp_by_rows: bool = False) -> None:
        """mlp_by_rows: the MLP takes some rows at a time. MKL is as fast with few (oneDNN is not),
        and copies an input that lies apart."""
        self._mlp_by_rows = mlp_by_rows

    def residual(self, embedded: Tensor) -> Tensor:
        return embedded.float()

    def norm(self, x: Tensor, weight: Tensor, eps: float, *, float8: bool = False) -> Tensor:
        return _norm(x, weight, eps, torch.empty_like(x, dtype=weight.dtype))

    def add_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The normed sum takes the place of `update`."""
        if len(residual) <= _ROWS_AT_A_TIME:
            return residual, _norm(residual.add_(update), weight, eps, update)
        parts = (torch.split(x, _ROWS_AT_A_TIME) for x in (residual, update))
        for rows, added in zip(*parts, strict=True):
            _norm(rows.add_(added), weight, eps, added)
        return residual, update

    def mlp(
        self, x: Tensor | ScaledRows, gate_up: Product, down: Product, *, float8: bool = False
    ) -> Tensor:
        """By rows: in x's place. Else not in gate's: oneDNN is faster on an input that does not lie
        apart."""
        if not self._mlp_by_rows:
            gate, up = gate_up(x).chunk(2, dim=-1)
            return down(F.silu(gate).mul_(up))
        assert isinstance(x, Tensor)
        for rows in torch.split(x, _ROWS_AT_A_TIME):
            gate, up = gate_up(rows).chunk(2, dim=-1)
            rows.copy_(down(F.silu(gate).mul_(up)))
        return x


def _norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    squares = torch.addcmul(_number(eps), length, length, value=1 / x.shape[-1])
    return torch.mul(x, squares.rsqrt_(), out=out).mul_(weight)


@lru_cache(maxsize=8)
def _number(value: float) -> Tensor:
    """As a tensor, for operations that take no plain number there."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")
