"""Attention for training on a CPU: plain matrix products, whose gradients are fast there.

torch's fused CPU kernel is quick forwards and slow backwards (measured: half of a step). The
function is one more kernel of `model.attention.kernels`; sequences of similar length are padded
together, so hand in a sorted batch.
Letters as there: T rows, H heads, K kv heads, E head width.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.attention.cpu import within
from model.packing import Segments

_SLACK = 0.75
"""A sequence shorter than this part of its group's longest starts the next group."""


def grouped_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """An AttentionKernel: q [Tq, H, E], k and v [Tk, K, E] -> [Tq, H, E].

    The queries of a sequence are its last rows; causal: rows see none behind them, and `window`
    rows in all.
    """
    window = within(window, keys)
    groups = _groups(keys.lengths)
    parts = [  # split: the gradient of a slice would be a tensor of all rows for each
        torch.split(x, [sum(lengths[first:last]) for first, last in groups])
        for x, lengths in ((q, queries.lengths), (k, keys.lengths), (v, keys.lengths))
    ]
    outputs = []
    for (first, last), q_rows, k_rows, v_rows in zip(groups, *parts, strict=True):
        sizes = np.array(queries.lengths[first:last]), np.array(keys.lengths[first:last])
        outputs.append(_attend(q_rows, k_rows, v_rows, *sizes, causal, window))
    return torch.cat(outputs)


def _groups(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
    """Runs [first, last) of sequences within `_SLACK` of one another."""
    bounds, low, high = [0], lengths[0], lengths[0]
    for index, length in enumerate(lengths):
        low, high = min(low, length), max(high, length)
        if low < _SLACK * high - 2:
            bounds.append(index)
            low = high = length
    bounds.append(len(lengths))
    return list(pairwise(bounds))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_lengths: np.ndarray,
    k_lengths: np.ndarray,
    causal: bool,
    window: int | None,
) -> Tensor:
    heads, width = q.shape[1:]
    kv_heads = k.shape[1]
    count, q_max, k_max = len(q_lengths), int(q_lengths.max()), int(k_lengths.max())
    q_place = _places(q_lengths, q_max)
    k_place = _places(k_lengths, k_max)
    # The query heads that share a kv head are rows of one product: nothing is repeated.
    q = _pad(q * width**-0.5, q_place, count * q_max)
    q = q.view(count, q_max, kv_heads, heads // kv_heads, width)
    q = q.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, -1, width)
    k = _pad(k, k_place, count * k_max).view(count, k_max, kv_heads, width)
    v = _pad(v, k_place, count * k_max).view(count, k_max, kv_heads, width)
    scores = q @ k.permute(0, 2, 3, 1)
    if int(k_lengths.min()) < k_max:
        beyond = torch.from_numpy(np.arange(k_max)[None] >= k_lengths[:, None]).to(q.device)
        scores = scores.masked_fill(beyond[:, None, None], -torch.inf)
    if causal:
        positions = (k_lengths - q_lengths)[:, None] + np.arange(q_max)[None]  # [N, q_max]
        # Padding sees what the last row sees: a row without a key would have NaN for its gradient.
        positions = np.minimum(positions, k_lengths[:, None] - 1)
        ahead = np.arange(k_max)[None, None] - positions[:, :, None]
        unseen = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
        hidden = torch.from_numpy(unseen).repeat(1, heads // kv_heads, 1).to(q.device)
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
    out = scores.softmax(dim=-1).to(v.dtype) @ v.transpose(1, 2)
    out = out.view(count, kv_heads, heads // kv_heads, q_max, width).permute(0, 3, 1, 2, 4)
    out = out.reshape(count * q_max, heads, width)
    return out if q_place is None else out.index_select(0, q_place.to(out.device))


def _places(lengths: np.ndarray, longest: int) -> Tensor | None:
    """[T] each packed row's place among the padded ones; None when nothing is padded."""
    if int(lengths.min()) == longest:
        return None
    rows = np.arange(longest)[None] + longest * np.arange(len(lengths))[:, None]
    return torch.from_numpy(rows[np.arange(longest)[None] < lengths[:, None]])


def _pad(x: Tensor, place: Tensor | None, rows: int) -> Tensor:
    if place is None:
        return x
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, place.to(x.device), x)
