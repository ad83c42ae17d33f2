"""The kernels of model.fused in Triton, which comes with torch's CUDA wheels.

One program handles one row whole: a row is read once, held in registers and reduced there. Only
`model.fused` calls them, and only it imports this module: elsewhere Triton is not installed.

They compute in float32. A row's float8 scale is its largest number / 448, and at least the smallest
normal number, for rows of zeros; NaN and infinity make a row's values NaN. Offsets of rows are
64 bit: 32,768 rows of 2 * 14,336 numbers are near the end of 32.
"""

# mypy: disable-error-code="misc,no-untyped-def,no-untyped-call,untyped-decorator"
# What is compiled is Triton's language, not Python: its types are not Python's.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _store_float8(y, values, scales, row, width, columns, within):
    """y, one row in float32 with 0 beyond its end, to values and scales."""
    largest = tl.max(tl.abs(y), axis=0)
    scale = tl.maximum(largest / 448.0, 1.1754943508222875e-38)
    # y / scale rounded could pass 448 by its last bit alone, which the cast rounds to 448.
    tl.store(scales + row, scale)
    scaled = (y / scale).to(values.dtype.element_ty)
    tl.store(values + row * width + columns, scaled, mask=within)


@triton.jit
def add_norm(
    residual, update, weight, values, scales, residual_stride, update_stride, width, eps,
    add: tl.constexpr, float8: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    within = columns < width
    place = residual + row * residual_stride + columns
    x = tl.load(place, mask=within, other=0.0).to(tl.float32)
    if add:
        added = tl.load(update + row * update_stride + columns, mask=within, other=0.0)
        rounded = (x + added.to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=within)
        x = rounded.to(tl.float32)  # what the next layers read
    rms = tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    y = x / rms * tl.load(weight + columns, mask=within, other=0.0).to(tl.float32)
    if float8:
        _store_float8(y, values, scales, row, width, columns, within)
    else:
        out = values + row * width + columns
        tl.store(out, y.to(values.dtype.element_ty), mask=within)


@triton.jit
def silu_up(
    gate_up, values, scales, stride, width, float8: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    within = columns < width
    start = gate_up + row * stride + columns
    gate = tl.load(start, mask=within, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=within, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    if float8:
        _store_float8(y, values, scales, row, width, columns, within)
    else:
        out = values + row * width + columns
        tl.store(out, y.to(values.dtype.element_ty), mask=within)


@triton.jit
def to_float8(x, values, scales, stride, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    within = columns < width
    y = tl.load(x + row * stride + columns, mask=within, other=0.0).to(tl.float32)
    _store_float8(y, values, scales, row, width, columns, within)


@triton.jit
def rotate(
    x, cos, sin, row_stride, head_stride, heads, half, head_block: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, block)[None, :]
    head = tl.arange(0, head_block)[:, None]
    within = (head < heads) & (pair < half)
    place = x + row * row_stride + head * head_stride + pair
    first = tl.load(place, mask=within, other=0.0).to(tl.float32)
    second = tl.load(place + half, mask=within, other=0.0).to(tl.float32)
    c = tl.load(cos + row * half + pair, mask=pair < half, other=0.0).to(tl.float32)
    s = tl.load(sin + row * half + pair, mask=pair < half, other=0.0).to(tl.float32)
    to = x.dtype.element_ty
    tl.store(place, (first * c - second * s).to(to), mask=within)
    tl.store(place + half, (second * c + first * s).to(to), mask=within)


_KERNELS = {"add_norm": add_norm, "silu_up": silu_up, "to_float8": to_float8, "rotate": rotate}


def launch(kernel: str, programs: int, *args: Any, **constants: Any) -> None:
    """model.fused.Launch. `args` starts with a tensor of the device to run on."""
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return launch(kernel, programs, *args, **constants)
    width = args[-2] if kernel == "add_norm" else args[-1]
    constants["block"] = numbers = triton.next_power_of_2(width)
    if kernel == "rotate":
        constants["head_block"] = triton.next_power_of_2(args[-2])
        numbers *= constants["head_block"]
    # A thread for 16 numbers, as far as a program may have so many warps.
    warps = min(16, max(1, numbers // 512))
    _KERNELS[kernel][(programs,)](*args, num_warps=warps, **constants)
    return None
