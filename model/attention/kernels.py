"""One variable-length attention function, and the kernels behind it.

Every kernel has the signature of `AttentionKernel`: full bidirectional attention inside each
sequence, nothing across sequences. `choose_kernel` picks one by name, once, at start.

Letters: Tq query rows, Tk key rows, H heads, K kv heads, E head width, N sequences.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UnsupportedError
from model.extras import how_to_install
from model.packing import ROUND_TO, Segments

logger = logging.getLogger("nv_embed.attention")


class AttentionKernel(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments
    ) -> Tensor:
        """q [Tq, H, E], k and v [Tk, K, E] -> [Tq, H, E].

        Row i of `queries` attends to all rows of sequence i of `keys`. Behind the last sequence
        there may be filler (CPU only), whose output rows hold anything.
        """
        ...


def sdpa_by_length(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """scaled_dot_product_attention, one call for all sequences of about the same length.

    The CPU's kernel: it has no variable-length one. Runs on every device and dtype. Lengths are
    rounded up, which costs a few masked rows, because torch keeps the code that it generates
    for each length (bfloat16 on AMX: 0.6 MB a length and thread, never freed); and one call for
    many sequences is faster than many calls.
    """
    k, v, grouped = _grouped(q, k, v)
    plan = _plan(queries, keys, len(q), len(k), q.dtype)

    def attend(alike: _Alike) -> Tensor:
        out = F.scaled_dot_product_attention(
            _take(q, alike.query_rows, alike.count),
            _take(k, alike.key_rows, alike.count),
            _take(v, alike.key_rows, alike.count),
            attn_mask=alike.mask,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2).flatten(0, 1)

    if plan[0].query_rows is None:  # as of a single text: nothing to put together
        return attend(plan[0])
    attended = torch.empty_like(q, memory_format=torch.contiguous_format)
    attended[sum(queries.lengths) :] = 0  # filler: anything, but no NaN left over in memory
    for alike in plan:
        _put(attended, alike.query_rows, attend(alike))
    return attended


@dataclass(frozen=True, slots=True)
class _Alike:
    """Sequences of one rounded length. What is beyond a sequence's end repeats its last row."""

    count: int
    query_rows: Tensor | slice | None  # [count * rounded length] the packed rows; None: all
    key_rows: Tensor | slice | None
    mask: Tensor | None  # [count, 1, 1, keys] added to the scores: 0, or -inf beyond the end


@lru_cache(maxsize=4)  # the batch at work, for all its layers: Segments are compared by identity
def _plan(
    queries: Segments, keys: Segments, q_rows: int, k_rows: int, dtype: torch.dtype
) -> list[_Alike]:
    device = keys.cu_seqlens.device
    compiled = dtype != torch.float32 and device.type != "cuda"  # for each length
    step = ROUND_TO if compiled else 1
    if len(keys.lengths) == 1 and (alone := _alone(queries, keys, q_rows, k_rows, step, dtype)):
        return [alone]
    members: dict[tuple[int, int], list[int]] = {}
    for index, (q_length, k_length) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        rounded = -(-q_length // step) * step, -(-k_length // step) * step
        members.setdefault(rounded, []).append(index)
    q_bounds, k_bounds = _row_bounds(queries, q_rows), _row_bounds(keys, k_rows)
    lengths = np.array(keys.lengths)
    groups = []
    for (q_length, k_length), chosen in sorted(members.items()):
        query_rows = _rows_up_to(q_length, *q_bounds[:, chosen])
        key_rows = _rows_up_to(k_length, *k_bounds[:, chosen])
        beyond = np.arange(k_length) >= lengths[chosen, None]
        mask = None
        if beyond.any():
            mask = torch.from_numpy(np.where(beyond, -np.inf, 0.0)[:, None, None]).to(device, dtype)
        rows = _index(query_rows, q_rows, device), _index(key_rows, k_rows, device)
        groups.append(_Alike(len(chosen), *rows, mask))
    return groups


def _alone(
    queries: Segments, keys: Segments, q_rows: int, k_rows: int, step: int, dtype: torch.dtype
) -> _Alike | None:
    """The plan of one sequence, if the filler reaches its rounded end: what the general one gives,
    without its tenth of a millisecond."""
    q_end, k_end = (-(-segments.lengths[0] // step) * step for segments in (queries, keys))
    if q_end > q_rows or k_end > k_rows:
        return None
    mask = None
    if k_end > keys.lengths[0]:
        mask = torch.zeros(1, 1, 1, k_end, dtype=dtype, device=keys.cu_seqlens.device)
        mask[..., keys.lengths[0] :] = -torch.inf
    query_rows = None if q_end == q_rows else slice(0, q_end)
    return _Alike(1, query_rows, None if k_end == k_rows else slice(0, k_end), mask)


def _row_bounds(segments: Segments, rows: int) -> np.ndarray:
    """[2, N] each sequence's first row and the last that it may read: its own last, since a
    neighbour's could be infinite; for the last sequence the filler's."""
    ends = np.cumsum(segments.lengths)
    lasts = ends - 1
    lasts[-1] = rows - 1
    return np.stack([ends - segments.lengths, lasts])


def _rows_up_to(length: int, starts: np.ndarray, lasts: np.ndarray) -> np.ndarray:
    """[N * length] the packed row at each place."""
    rows: np.ndarray = np.minimum(starts[:, None] + np.arange(length), lasts[:, None])
    return rows.ravel()


def _index(rows: np.ndarray, count: int, device: torch.device) -> Tensor | slice | None:
    """A slice where the rows follow one another: a view in place of a copy. None: all `count`."""
    if (np.diff(rows) == 1).all():
        first, last = int(rows[0]), int(rows[-1])
        return None if (first, last) == (0, count - 1) else slice(first, last + 1)
    return torch.from_numpy(rows).to(device)


def _put(target: Tensor, rows: Tensor | slice | None, values: Tensor) -> None:
    """Rows beyond a sequence's end write its last row again, with the same values."""
    if isinstance(rows, Tensor):
        target.index_copy_(0, rows, values)
    else:
        target[slice(None) if rows is None else rows] = values


def _take(x: Tensor, rows: Tensor | slice | None, count: int) -> Tensor:
    """x [T, heads, E] -> [count, heads, L, E]."""
    if rows is not None:
        x = x.index_select(0, rows) if isinstance(rows, Tensor) else x[rows]
    if count == 1:
        return x.transpose(0, 1)[None]
    return torch.unflatten(x, 0, (count, len(x) // count)).transpose(1, 2)


def sdpa_padded(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
    """All padded to the longest: for GPUs and dtypes that the varlen kernels refuse."""
    k, v, grouped = _grouped(q, k, v)
    q_pad, k_pad, v_pad = _pad(q, queries), _pad(k, keys), _pad(v, keys)
    lengths = keys.cu_seqlens.diff()
    mask = torch.arange(keys.max_seqlen, device=k.device) < lengths[:, None]
    out = F.scaled_dot_product_attention(
        q_pad, k_pad, v_pad, attn_mask=mask[:, None, None], enable_gqa=grouped
    ).transpose(1, 2)
    return out.flatten(0, 1)[_padded_rows(queries)]


def _grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """k, v, and whether scaled_dot_product_attention must share their heads among q's.

    On CUDA it does that only in its flash and its math kernel. Flash takes neither a mask nor
    float32, and math holds all scores at once (137 GB for 32,768 tokens of the 7B model), so
    there the heads are repeated and the memory-efficient kernel can run.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cuda":
        return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), False
    return k, v, groups > 1


def _padded_rows(segments: Segments) -> Tensor:
    """[T] the row that each packed row takes in the flattened padded tensor [N * max_seqlen]."""
    bounds = segments.cu_seqlens
    rows = sum(segments.lengths)
    lengths = bounds.diff()
    sequence = torch.repeat_interleave(
        torch.arange(segments.num_seqs, device=bounds.device), lengths, output_size=rows
    )
    within = torch.arange(rows, device=bounds.device) - bounds[:-1][sequence]
    return sequence * segments.max_seqlen + within


def _pad(x: Tensor, segments: Segments) -> Tensor:
    """[T, heads, E] -> [N, heads, max_seqlen, E], zeros after each sequence."""
    shape = (segments.num_seqs * segments.max_seqlen, *x.shape[1:])
    padded = x.new_zeros(shape).index_copy_(0, _padded_rows(segments), x)
    return torch.unflatten(padded, 0, (segments.num_seqs, segments.max_seqlen)).transpose(1, 2)


def varlen_kernel(attend: Callable[..., Tensor]) -> AttentionKernel:
    """A kernel around torch's `varlen_attn`, whose signature changes between releases."""
    parameters = inspect.signature(attend).parameters
    native_gqa = "enable_gqa" in parameters
    # One split of the keys, so that a text's bits do not depend on how many there are beside it.
    always: dict[str, Any] = {"num_splits": 1} if "num_splits" in parameters else {}

    def varlen(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
        options = dict(always)
        if q.shape[1] != k.shape[1]:
            if native_gqa:
                options["enable_gqa"] = True
            else:
                groups = q.shape[1] // k.shape[1]
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return attend(
            q,
            k,
            v,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            **options,
        )

    return varlen


def flash_attn_kernel(attend: Callable[..., Tensor]) -> AttentionKernel:
    """A kernel around `flash_attn_varlen_func` of the flash-attn package."""

    def flash_attn(q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments) -> Tensor:
        return attend(
            q,
            k,
            v,
            queries.cu_seqlens,
            keys.cu_seqlens,
            queries.max_seqlen,
            keys.max_seqlen,
            causal=False,
        )

    return flash_attn


def _load_varlen() -> AttentionKernel:
    varlen = importlib.import_module("torch.nn.attention.varlen")
    return varlen_kernel(varlen.varlen_attn)


def _load_flash_attn() -> AttentionKernel:
    return flash_attn_kernel(importlib.import_module("flash_attn").flash_attn_varlen_func)


@dataclass(frozen=True, slots=True)
class _Kernel:
    load: Callable[[], AttentionKernel]
    why_not: Callable[[torch.device, torch.dtype], str | None]
    """The reason why it cannot run there, or None when it can."""


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _flash_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cpu":  # first: on a CPU nothing else would help
        return "it runs on CUDA only"
    # On meta tensors the kernels accept float32, which CUDA does not: so we check ourselves.
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    return None


def _varlen_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _flash_refusal(device, dtype):
        return reason
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen (2.10 or later has)"
    return None


def _flash_attn_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _flash_refusal(device, dtype):
        return reason
    if importlib.util.find_spec("flash_attn") is None:
        return f"the flash-attn package is not installed: {how_to_install('flash-attn')}"
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:  # often: it was compiled for another torch
        logger.warning("flash-attn is installed and cannot be imported: %s", error)
        return f"the flash-attn package cannot be imported: {error}"
    if not hasattr(module, "flash_attn_varlen_func"):  # flash-attn-4 installs a folder beside it
        return f"what is installed as flash_attn is another package: {how_to_install('flash-attn')}"
    return None


_KERNELS = {
    # The same kernel as flash-attn's, compiled with torch: it cannot be for another one.
    "varlen": _Kernel(_load_varlen, _varlen_refusal),
    "flash-attn": _Kernel(_load_flash_attn, _flash_attn_refusal),
    "padded": _Kernel(lambda: sdpa_padded, _always),
    "sdpa": _Kernel(lambda: sdpa_by_length, _always),
}
KERNEL_NAMES = tuple(_KERNELS)


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, AttentionKernel]:
    """The kernel of that name, or with "auto" the first that runs: (its name, the function).

    Raises UnsupportedError when a kernel asked for by name cannot run there.
    """
    if name == "auto":
        if device.type == "cpu":
            return "sdpa", sdpa_by_length
        name = next(n for n, kernel in _KERNELS.items() if not kernel.why_not(device, dtype))
    if name not in _KERNELS:
        raise UnsupportedError(f"unknown attention {name!r}; known: auto, {', '.join(_KERNELS)}")
    if reason := _KERNELS[name].why_not(device, dtype):
        raise UnsupportedError(f"attention {name!r} cannot be used on {device}: {reason}")
    return name, _KERNELS[name].load()


def available_kernels(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that can run there, best first."""
    return [name for name, kernel in _KERNELS.items() if not kernel.why_not(device, dtype)]
