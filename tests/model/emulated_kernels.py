"""The GPU's kernels for the emulated CUDA device: what each refuses, and what runs in its place.

The conditions are those that torch and FlashAttention 2 document or check themselves: a kernel
that a CPU would run all the same is refused here as a GPU refuses it. `run` computes on the CPU,
in float32 where the GPU accumulates in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


class RefusedError(RuntimeError):
    """A GPU would have refused it, or given garbage."""


@dataclass(frozen=True, slots=True)
class Kernel:
    check: Callable[..., None]
    """(capability, the operation's arguments): raises RefusedError."""
    run: Callable[..., Any] | None = None
    """On the CPU's tensors; None: as the CPU does it."""


UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
"""They hold what memory held."""
WHOLE = ("scaled_dot_product_attention", "scaled_mm", "segment_reduce")
"""Not to be taken apart, though torch could: a CUDA build may ask the driver on the way."""


def name_of(op: OpOverload) -> str:
    return op._schema.name.partition("::")[2]


def unwritten(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """All bits set: NaN in each float type, -1 in each integer."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        out.untyped_storage().fill_(255)
        return out

    return made


def host_reads(op: OpOverload, args: Any, kwargs: Any) -> str | None:
    """What the host reads from the device to run `op`, where it does."""
    name = name_of(op)
    if name == "segment_reduce":  # it looks at the lengths, unless told not to
        return None if kwargs.get("unsafe") else "segment_reduce checks its lengths"
    if name == "index":
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        return "indexing by a mask" if masks else None
    if name == "repeat_interleave":
        sized = kwargs.get("output_size") is not None
        return None if sized else "repeat_interleave without output_size"
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return f"the result of {name}" if any(tag in op.tags for tag in tags) else None


# -- FlashAttention 2, variable lengths


def _check_flash(
    capability: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    q_most: int,
    k_most: int,
    dropout: float,
    causal: bool,
    *_: Any,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **__: Any,
) -> None:
    _need(capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer")
    for x in (q, k, v):
        _need(x.dtype in (torch.float16, torch.bfloat16), "FlashAttention: fp16 and bf16 only")
        _need(x.dtype == q.dtype, "query, key and value must have the same dtype")
        _need(x.dim() == 3, "total rows x heads x head size")
        _need(x.stride(-1) == 1, "the last dimension must be contiguous")
        steps = [x.storage_offset(), *x.stride()[:-1]]
        _need(not any(n * x.element_size() % 16 for n in steps), "rows must be 16-byte aligned")
    for bounds in (q_bounds, k_bounds):
        _need(bounds.dtype == torch.int32, "cu_seqlens must have dtype int32")
        _need(bounds.is_contiguous(), "cu_seqlens must be contiguous")
    _need(q_bounds.shape == k_bounds.shape, "as many sequences of keys as of queries")
    _need(type(q_most) is int and type(k_most) is int, "max_seqlen is a number of the host's")
    width = q.shape[2]
    _need(width <= 256 and width % 8 == 0, "head size: a multiple of 8, at most 256")
    _need(q.shape[1] % k.shape[1] == 0, "heads: a multiple of the key heads")
    _need(dropout == 0, "the model has no dropout")
    window = [-1 if side is None else side for side in (window_size_left, window_size_right)]
    _need(window == [-1, -1] or window[1] == 0, "a window reaches to the row itself")
    _need(window != [-1, 0] or causal, "a window up to the row itself is a causal mask")
    swapped = q_most == 1 and q.shape[1] > k.shape[1]  # groups of heads take the place of rows
    _need(not swapped or len(q) == len(q_bounds) - 1, "max_seqlen_q 1 with an empty sequence")


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    q_most: int,
    k_most: int,
    dropout: float,
    causal: bool,
    *_: Any,
    window_size_left: int | None = None,
    **__: Any,
) -> tuple[Tensor, ...]:
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)  # rows of no sequence stay as they were
    groups = q.shape[1] // k.shape[1]
    q_ends, k_ends = q_bounds.tolist(), k_bounds.tolist()
    _need(q_ends[-1] <= len(q) and k_ends[-1] <= len(k), "bounds beyond the rows")
    for i in range(len(q_ends) - 1):
        rows, others = slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])
        queries, keys = rows.stop - rows.start, others.stop - others.start
        _need(queries >= 0 and keys >= 0, "bounds that fall")
        _need(queries <= q_most and keys <= k_most, "longer than max_seqlen: rows are left out")
        if not queries:
            continue
        x, y, z = (part.float().transpose(0, 1) for part in (q[rows], k[others], v[others]))
        y, z = y.repeat_interleave(groups, 0), z.repeat_interleave(groups, 0)
        scores = x @ y.transpose(1, 2) / math.sqrt(q.shape[2])
        own = torch.arange(keys - queries, keys)[:, None]
        windowed = window_size_left is not None and window_size_left >= 0
        if causal or windowed:  # the mask's corner is where the last query meets the last key
            scores = scores.masked_fill(torch.arange(keys) > own, -torch.inf)
        if windowed:
            scores = scores.masked_fill(torch.arange(keys) < own - window_size_left, -torch.inf)
        weights = torch.softmax(scores, -1)
        # The kernel multiplies the values by weights of their dtype.
        out[rows] = (weights.to(q.dtype).float() @ z).transpose(0, 1).to(q.dtype)
    sums = torch.zeros(q.shape[1], len(q))
    seeds = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, sums, *seeds, torch.zeros(0)


# -- float8 products


def _check_scaled_mm(
    capability: tuple[int, int],
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> None:
    _need(capability >= (8, 9), "torch._scaled_mm needs compute capability 8.9")
    for x in (a, b):
        _need(x.dtype == torch.float8_e4m3fn, f"expected float8_e4m3fn, not {x.dtype}")
    _need(a.stride(1) == 1, "the first matrix must be row-major")
    _need(b.stride(0) == 1, "the second matrix must be column-major")
    _need(a.shape[1] == b.shape[0], "the matrices do not fit")
    _need(a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0, "dimensions must be divisible by 16")
    for scale, shape in ((scale_a, (len(a), 1)), (scale_b, (1, b.shape[1]))):
        _need(scale.dtype == torch.float32, f"a scale must be float32, not {scale.dtype}")
        _need(tuple(scale.shape) == shape, f"a scale of {tuple(scale.shape)}, not {shape}")
        _need(scale.is_contiguous(), "a scale must be contiguous")
    _need(out_dtype == torch.bfloat16, "row-wise scales give bfloat16 only")
    _need(bias is None and scale_result is None, "row-wise scales, and nothing else")


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)


_ROW_WISE = 1
"""torch.nn.functional.ScalingType.RowWise as the operation below gets it."""


def _check_scaled_mm_v2(
    capability: tuple[int, int],
    a: Tensor,
    b: Tensor,
    scale_a: list[Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    *_: Any,
) -> None:
    """What torch.nn.functional.scaled_mm calls."""
    _need(recipe_a == recipe_b == [_ROW_WISE], "row-wise scales, and nothing else")
    _check_scaled_mm(capability, a, b, *scale_a, *scale_b, bias, None, out_dtype)


def _scaled_mm_v2(
    a: Tensor,
    b: Tensor,
    scale_a: list[Tensor],
    recipe_a: list[int],
    swizzle_a: list[int],
    scale_b: list[Tensor],
    recipe_b: list[int],
    swizzle_b: list[int],
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    *_: Any,
) -> Tensor:
    return _scaled_mm(a, b, *scale_a, *scale_b, out_dtype=out_dtype)


# -- means of segments


def _check_segment_reduce(
    capability: tuple[int, int], data: Tensor, reduce: str, *, lengths: Tensor, **_: Any
) -> None:
    _need(lengths.dtype in (torch.int32, torch.int64), "lengths must be int32 or int64")
    _need(lengths.is_contiguous() and data.is_contiguous(), "data and lengths must be contiguous")


def _segment_reduce(data: Tensor, reduce: str, *, lengths: Tensor, **options: Any) -> Tensor:
    """The CPU's wants lengths that add up to the rows; a GPU leaves the rest alone."""
    _need(int(lengths.sum()) <= len(data), "segments beyond the rows")
    rows = data[: int(lengths.sum())]
    return torch.segment_reduce(rows, reduce, lengths=lengths, **{**options, "unsafe": True})


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise RefusedError(message)


KERNELS = {
    "_flash_attention_forward": Kernel(_check_flash, _flash),
    "_scaled_mm": Kernel(_check_scaled_mm, _scaled_mm),
    "_scaled_mm_v2": Kernel(_check_scaled_mm_v2, _scaled_mm_v2),
    "segment_reduce": Kernel(_check_segment_reduce, _segment_reduce),
}
"""By the operation's name."""
