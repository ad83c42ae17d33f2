"""list[Encoding] -> PackedBatch: sequences end to end, no padding, and which rows are pooled.

Shapes: T packed tokens, N sequences, P pooled rows (P <= T). Behind the last sequence there may
be filler, counted in T and P and in no sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.batch import Encoding, continues
from model.families import Pooled

ROUND_TO = 16
"""What a CPU rounds lengths and numbers of rows up to: the rows of a tile of AMX."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """N runs of rows, end to end: their lengths for the host, their bounds for the kernels."""

    lengths: tuple[int, ...]  # [N]
    cu_seqlens: Tensor  # [N+1] int32 on the device: 0, lengths[0], lengths[0]+lengths[1], …
    max_seqlen: int
    plan: object = None
    """How attention goes from these rows to those of the sequences, where a kernel wants that
    prepared: what a Planner made."""

    @property
    def num_seqs(self) -> int:
        return len(self.lengths)

    def between(self, first: int, last: int) -> Segments:
        """What of each run lies in rows `first` to `last` (not included), counted from `first`:
        for most, nothing."""
        ends = np.clip(np.cumsum([0, *self.lengths]), first, last)
        lengths = np.diff(ends)
        bounds = self.cu_seqlens.clamp(first, last) - first
        return Segments(tuple(lengths.tolist()), bounds, int(lengths.max()))


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """What is pooled where a sequence has several vectors. Spans may overlap."""

    rows: Tensor  # [S] int32 rows of the T, those of a span in a run
    segments: Segments  # the vectors over the S rows


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """One forward's worth of tokens, on the device."""

    input_ids: Tensor  # [T] int32
    positions: Tensor  # [T] int32, from 0 at each BOS
    seqs: Segments  # the N sequences over the T tokens
    pool_rows: Tensor | None  # [P] int32 rows of the T that are pooled; None: all of them
    pooled: Segments  # the N sequences over the P pooled rows
    spans: Spans | None = None  # what to pool in their place, when all rows have gone through

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seqs.num_seqs


Planner = Callable[[Segments, Segments, int, int], object]
"""(query rows, key rows, number of query rows with filler, of key rows) -> Segments.plan."""


def pack(
    encodings: Sequence[Encoding],
    device: torch.device,
    *,
    pooled: Pooled = "text",
    filler: bool = False,
    planner: Planner | None = None,
) -> PackedBatch:
    """Lay the encodings end to end on `device`, in one upload.

    pooled: which rows of each the family pools.
    filler: make T and P two of a few numbers, for products that are compiled for each.
    planner: prepares attention for all layers; None: the kernel wants nothing prepared.
    """
    assert encodings, "an empty batch"
    if any(e.span is not None for e in encodings):
        return _pack_spans(encodings, device, pooled, filler, planner)
    lengths = np.array([len(e) for e in encodings], dtype=np.int32)
    starts = _pool_starts(encodings, lengths, pooled)
    bounds = _bounds(lengths)
    positions = np.arange(bounds[-1], dtype=np.int32) - np.repeat(bounds[:-1], lengths)
    ids = np.concatenate([e.ids for e in encodings])
    fill = _filled if filler else _as_it_is
    parts = [fill(ids), fill(positions), bounds]
    if starts.any():
        pool_rows = np.flatnonzero(positions >= np.repeat(starts, lengths)).astype(np.int32)
        parts += [fill(pool_rows), _bounds(lengths - starts)]
    tensors = _upload(parts, device)
    seqs, rows = _segments(lengths, tensors[2]), len(tensors[0])
    if planner is not None:
        seqs = replace(seqs, plan=planner(seqs, seqs, rows, rows))
    if not starts.any():
        return PackedBatch(tensors[0], tensors[1], seqs, pool_rows=None, pooled=seqs)
    chosen = _segments(lengths - starts, tensors[4])
    if planner is not None:
        chosen = replace(chosen, plan=planner(chosen, seqs, len(tensors[3]), rows))
    return PackedBatch(tensors[0], tensors[1], seqs, tensors[3], chosen)


def _pack_spans(
    encodings: Sequence[Encoding],
    device: torch.device,
    pooled: Pooled,
    filler: bool,
    planner: Planner | None,
) -> PackedBatch:
    """Each sequence once, all rows through all layers, and then those of each span."""
    pairs = list(zip(encodings, (None, *encodings), strict=False))
    is_first = np.array([not continues(encoding, before) for encoding, before in pairs])
    sequences = [Encoding(e.ids) for e, before in pairs if not continues(e, before)]
    batch = pack(sequences, device, pooled="all", filler=filler, planner=planner)
    own = np.array([len(e) for e in encodings], dtype=np.int32)
    ends = np.array([len(e) if e.span is None else e.span.end for e in encodings])
    starts = _pool_starts(encodings, own, pooled)
    lengths = (ends - starts).astype(np.int32)
    bounds = _bounds(lengths)
    first_rows = _bounds(own[is_first])[np.cumsum(is_first) - 1] + starts
    rows = np.arange(bounds[-1], dtype=np.int32) + np.repeat(first_rows - bounds[:-1], lengths)
    fill = _filled if filler else _as_it_is
    there = _upload([fill(rows.astype(np.int32)), bounds], device)
    return replace(batch, spans=Spans(there[0], _segments(lengths, there[1])))


def _pool_starts(encodings: Sequence[Encoding], lengths: np.ndarray, pooled: Pooled) -> np.ndarray:
    """[N] the first row of each that is pooled, counted from its own first."""
    if pooled == "last":
        return lengths - 1
    if pooled == "all":
        return np.zeros_like(lengths)
    return np.array([e.pool_start for e in encodings], dtype=np.int32)


def _filled(rows: np.ndarray) -> np.ndarray:
    """As many more of the last as make a multiple of 16, or of about an eighth of them: eight
    numbers for each doubling, at most an eighth of filler."""
    step = max(ROUND_TO, 1 << (len(rows) // 8).bit_length() >> 1)
    return np.pad(rows, (0, -len(rows) % step), mode="edge")


def _as_it_is(rows: np.ndarray) -> np.ndarray:
    return rows


def _bounds(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def segments_of(lengths: Sequence[int], device: torch.device) -> Segments:
    """Runs of so many rows each, end to end."""
    sizes = np.array(lengths, dtype=np.int32)
    return _segments(sizes, torch.from_numpy(_bounds(sizes)).to(device))


def _segments(lengths: np.ndarray, cu_seqlens: Tensor) -> Segments:
    return Segments(tuple(lengths.tolist()), cu_seqlens, int(lengths.max()))


def _upload(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """One transfer for all int32 arrays."""
    host = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        host = host.pin_memory()
    return place(host, [len(part) for part in parts], device)


def place(host: Tensor, sizes: list[int], device: torch.device) -> list[Tensor]:
    """Move `host` to `device` and cut it into views of `sizes`."""
    return list(torch.split(host.to(device, non_blocking=True), sizes))
