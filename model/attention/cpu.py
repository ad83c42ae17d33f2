"""The CPU's attention kernel, and the plan that a batch carries for it.

The plan is made once for all layers of a forward (`planner`, which `pack` calls), and says which
sequences are attended to in one call. It holds rows and masks, no numbers of a layer.

Letters: Tq query rows, Tk key rows, H heads, K kv heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.packing import ROUND_TO, Planner, Segments

_BLOCK_ROWS = 256
"""Queries under a causal mask that are attended to at a time: none of them needs the keys behind
the last of them, so about half of the products are saved where sequences are long, and the mask
stays small."""


@dataclass(frozen=True, slots=True)
class _Alike:
    """Sequences of one rounded length. What is beyond a sequence's end repeats its last row."""

    count: int
    query_rows: Tensor | slice | None  # [count * rounded length] the packed rows; None: all
    key_rows: Tensor | slice | None
    mask: Tensor | None  # [count, 1, 1, keys] added to the scores: 0, or -inf beyond the end
    blocks: tuple[_Block, ...] = ()  # of a causal mask; else all queries go at once


@dataclass(frozen=True, slots=True)
class _Block:
    """Some queries of sequences of one length, and the keys that any of them sees."""

    queries: slice
    keys: slice
    sees: Tensor  # bool [count, 1, queries, keys]


@dataclass(frozen=True, slots=True)
class Plan:
    """For queries and keys of so many rows, in this dtype, under this mask and its window."""

    groups: list[_Alike]
    made_for: tuple[int, int, torch.dtype, bool, int | None]


def planner(dtype: torch.dtype, *, causal: bool, window: int | None = None) -> Planner:
    """Makes the plan of `sdpa_by_length` for q, k and v of `dtype`."""

    def plan(queries: Segments, keys: Segments, q_rows: int, k_rows: int) -> Plan:
        return _plan(queries, keys, q_rows, k_rows, dtype, causal, window)

    return plan


def within(window: int | None, keys: Segments) -> int | None:
    """The window, where one of the sequences is longer."""
    return window if window is not None and window < keys.max_seqlen else None


def sdpa_by_length(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """scaled_dot_product_attention, one call for all sequences of about the same length.

    The CPU's kernel: it has no variable-length one. Runs on every device and dtype. Lengths are
    rounded up, which costs a few masked rows, because torch keeps the code that it generates
    for each length (bfloat16 on AMX: 0.6 MB a length and thread, never freed); and one call for
    many sequences is faster than many calls. Makes its own plan where the batch carries none.
    """
    k, v, grouped = shared_heads(q, k, v)
    plan = queries.plan or _plan(queries, keys, len(q), len(k), q.dtype, causal, window)
    assert isinstance(plan, Plan), plan
    assert plan.made_for == (len(q), len(k), q.dtype, causal, window), plan.made_for

    def attend(alike: _Alike) -> Tensor:
        heads = (
            _take(q, alike.query_rows, alike.count),
            _take(k, alike.key_rows, alike.count),
            _take(v, alike.key_rows, alike.count),
        )
        if alike.blocks:
            out = _in_blocks(*heads, alike.blocks, grouped)
        else:
            out = F.scaled_dot_product_attention(*heads, attn_mask=alike.mask, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)

    if plan.groups[0].query_rows is None:  # as of a single text: nothing to put together
        return attend(plan.groups[0])
    attended = torch.empty_like(q, memory_format=torch.contiguous_format)
    attended[sum(queries.lengths) :] = 0  # filler: anything, but no NaN left over in memory
    for alike in plan.groups:
        _put(attended, alike.query_rows, attend(alike))
    return attended


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[_Block], grouped: bool) -> Tensor:
    """q [N, H, queries, E] over k and v [N, K, keys, E]. What is beyond a sequence's end sees what
    its last row sees, so it is equal to that."""
    parts = [
        F.scaled_dot_product_attention(
            q[:, :, block.queries],
            k[:, :, block.keys],
            v[:, :, block.keys],
            attn_mask=block.sees,
            enable_gqa=grouped,
        )
        for block in blocks
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _plan(
    queries: Segments,
    keys: Segments,
    q_rows: int,
    k_rows: int,
    dtype: torch.dtype,
    causal: bool,
    window: int | None,
) -> Plan:
    made_for = q_rows, k_rows, dtype, causal, window
    device = keys.cu_seqlens.device
    window = within(window, keys)
    # A lone query is the last row of its sequence: it sees all keys under either mask.
    causal = causal and (queries.max_seqlen > 1 or window is not None)
    compiled = dtype != torch.float32 and device.type != "cuda"  # for each length
    step = ROUND_TO if compiled else 1
    if len(keys.lengths) == 1 and not causal:
        alone = _alone(queries, keys, q_rows, k_rows, step, dtype)
        if alone is not None:
            return Plan([alone], made_for)
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
        mask: Tensor | None = None
        blocks: tuple[_Block, ...] = ()
        if causal:
            ends = lengths[chosen, None] - 1
            firsts = ends + 1 - np.array(queries.lengths)[chosen, None]
            last_seen = np.minimum(firsts + np.arange(q_length), ends)
            blocks = _blocks(last_seen, k_length, window, step, device)
        elif (beyond := np.arange(k_length) >= lengths[chosen, None]).any():
            mask = torch.from_numpy(np.where(beyond, -np.inf, 0.0)[:, None, None]).to(device, dtype)
        rows = _index(query_rows, q_rows, device), _index(key_rows, k_rows, device)
        groups.append(_Alike(len(chosen), *rows, mask, blocks))
    return Plan(groups, made_for)


def _blocks(
    last_seen: np.ndarray, k_length: int, window: int | None, step: int, device: torch.device
) -> tuple[_Block, ...]:
    """last_seen [N, queries]: the last key that each sees."""
    blocks = []
    for first in range(0, last_seen.shape[1], _BLOCK_ROWS):
        rows = slice(first, min(first + _BLOCK_ROWS, last_seen.shape[1]))
        last = last_seen[:, None, rows, None]
        end = min(-(-int(last.max() + 1) // step) * step, k_length)
        begin = 0 if window is None else max(int(last.min()) - window + 1, 0) // step * step
        keys = np.arange(begin, end)
        sees = keys <= last
        if window is not None:
            sees &= keys > last - window
        blocks.append(_Block(rows, slice(begin, end), torch.from_numpy(sees).to(device)))
    return tuple(blocks)


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


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """k, v, and whether scaled_dot_product_attention must share their heads among q's.

    On CUDA it does that only in its flash and its math kernel. Flash takes neither a mask nor
    float32, and math holds all scores at once (137 GB for 32,768 tokens of the 7B model), so
    there the heads are repeated and the memory-efficient kernel can run.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cuda":
        return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), False
    return k, v, groups > 1
