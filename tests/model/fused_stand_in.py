"""The fused kernels in torch's operations, behind the signature of `model.fused.Launch`: what runs
in their place where there is no GPU. They take shapes and strides from the tensors, and the sizes
that they are given only to see that these fit."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def launch(kernel: str, programs: int, *args: Any, **constants: Any) -> None:
    _KERNELS[kernel](programs, *args, **constants)


def _add_norm(
    programs: int,
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    values: Tensor,
    scales: Tensor,
    residual_stride: int,
    update_stride: int,
    width: int,
    eps: float,
    *,
    add: bool,
    float8: bool,
) -> None:
    assert residual.shape == update.shape == values.shape == (programs, width)
    assert (residual.stride(), update.stride()) == ((residual_stride, 1), (update_stride, 1))
    if add:
        residual.copy_(residual.float() + update.float())
    y = F.rms_norm(residual.float(), (width,), weight.float(), eps)
    _store(y, values, scales, float8)


def _silu_up(
    programs: int,
    gate_up: Tensor,
    values: Tensor,
    scales: Tensor,
    stride: int,
    width: int,
    *,
    float8: bool,
) -> None:
    assert gate_up.shape == (programs, 2 * width)
    assert gate_up.stride() == (stride, 1)
    gate, up = gate_up.float().chunk(2, dim=1)
    _store(F.silu(gate) * up, values, scales, float8)


def _to_float8(
    programs: int, x: Tensor, values: Tensor, scales: Tensor, stride: int, width: int
) -> None:
    assert (x.shape, x.stride()) == ((programs, width), (stride, 1))
    _store(x.float(), values, scales, True)


def _rotate(
    programs: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    row_stride: int,
    head_stride: int,
    heads: int,
    half: int,
) -> None:
    assert (x.shape, x.stride()) == ((programs, heads, 2 * half), (row_stride, head_stride, 1))
    assert cos.shape == sin.shape == (programs, 1, half)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    first, second = x.float().chunk(2, dim=-1)
    c, s = cos.float(), sin.float()
    x.copy_(torch.cat((first * c - second * s, second * c + first * s), dim=-1))


def _store(y: Tensor, values: Tensor, scales: Tensor, float8: bool) -> None:
    assert values.is_contiguous()
    assert values.shape == y.shape
    assert (values.dtype == torch.float8_e4m3fn) == float8
    if float8:
        assert scales.shape == (len(y), 1)
        assert scales.dtype == torch.float32
        found = y.abs().amax(1, keepdim=True) / 448
        scales.copy_(found.clamp_min(torch.finfo(torch.float32).tiny))
        y = y / scales
    values.copy_(y)


_KERNELS = {
    "add_norm": _add_norm,
    "silu_up": _silu_up,
    "to_float8": _to_float8,
    "rotate": _rotate,
}
