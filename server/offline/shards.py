"""How the rows of a slice are cut into shards. Knows neither what rows hold nor where shards go."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

from server.offline.job import Refusal, Row, Rows
from server.offline.parts import Shard, SliceEnd
from server.offline.places import Place, Refused, place_of
from server.offline.slices import Slice
from server.offline.sources import Source

_SHARD_BYTES = 64 << 20
_ROW_BYTES = 8192
"""A shard holds no more text than this times its size (or 64 MiB): long rows make short shards."""


class Chunk(NamedTuple, Generic[Row]):
    """The rows of one shard: which of its rows each is, and those that were refused already."""

    shard: Shard
    rows: list[Row]
    places: list[int]
    refusals: list[Refusal]


@dataclass(slots=True)
class Reading:
    """How far a slice was read, 0 to 1."""

    share: float = 0.0


def chunks_of(
    which: Slice,
    sources: Sequence[Source],
    rows: Rows[Row],
    size: int,
    *,
    skip: bool = False,
    reading: Reading | None = None,
) -> Iterator[Chunk[Row] | SliceEnd]:
    """The shards of one slice, then how it ended; the same input and size give the same.

    skip: rows that are refused are counted, and not raised.
    """
    most = max(_SHARD_BYTES, size * _ROW_BYTES)
    chunk: Chunk[Row] = _begun()
    digest, weight, first = hashlib.sha256(), 0, 0
    number = 0
    counts: list[tuple[int, int]] = []
    for row, place in _rows(which, sources, rows, skip, counts, reading or Reading()):
        added = 0 if isinstance(row, Refused) else rows.weight(row)
        count = len(chunk.rows) + len(chunk.refusals)
        if count and (count == size or weight + added > most):
            yield _ended(chunk, which, number, first, digest.hexdigest())
            number, first = number + 1, first + count
            chunk, digest, weight, count = _begun(), hashlib.sha256(), 0, 0
        if isinstance(row, Refused):
            chunk.refusals.append(Refusal(count, place.span, row.number, row.why))
            key = b"\0refused\0" + row.why.encode()
        else:
            chunk.rows.append(row)
            chunk.places.append(count)
            key = rows.key(row)
        digest.update(len(key).to_bytes(8, "little") + key)
        weight += added
    if count := len(chunk.rows) + len(chunk.refusals):
        yield _ended(chunk, which, number, first, digest.hexdigest())
        number += 1
    yield SliceEnd(which.number, number, tuple(counts))


def _begun() -> Chunk[Row]:
    return Chunk(Shard(0, 0, 0, 0, ""), [], [], [])


def _ended(chunk: Chunk[Row], which: Slice, number: int, first: int, digest: str) -> Chunk[Row]:
    count = len(chunk.rows) + len(chunk.refusals)
    return chunk._replace(shard=Shard(which.number, number, first, count, digest))


def _rows(
    which: Slice,
    sources: Sequence[Source],
    rows: Rows[Row],
    skip: bool,
    counts: list[tuple[int, int]],
    reading: Reading,
) -> Iterator[tuple[Row | Refused, Place]]:
    for index, span in enumerate(which.spans):
        source = sources[span.source]
        place = place_of(source, span.begin, span.end, span=index, skip=skip)
        count = 0
        for row in rows.read(source, place):
            count += 1
            reading.share = (index + place.read) / len(which.spans)
            yield row, place
        counts.append((count, place.lines))
        if span.end is None or span.end == source.size:
            source.close()
    reading.share = 1.0
