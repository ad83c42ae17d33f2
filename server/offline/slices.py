"""How inputs are cut before anything of them is read: by bytes, or by Parquet's row groups.

A line belongs to the slice in which its first byte lies, so that whoever reads one slice needs no
other: `--part I/N` and the devices of one run share them without a word. The same inputs and size
give the same slices. Knows neither what rows hold nor where they go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from server.offline.kinds import Kind
from server.offline.parquet_files import row_groups
from server.offline.sources import Source

SLICE_BYTES_PER_ROW = 512
"""Of line files a slice has this many bytes for each row that a shard may have."""
INDEX_BITS = 32
"""In a folder of shards a row's index is its slice's number and, in so many bits, its own."""


class Span(NamedTuple):
    """A part of one input: bytes of a line file, or row groups of Parquet; end None: to the end."""

    source: int
    begin: int
    end: int | None


class Slice(NamedTuple):
    """What one reader reads from its beginning to its end; small files share one."""

    number: int
    spans: tuple[Span, ...]
    size: int  # bytes, about; 0 of a stream

    @property
    def first_index(self) -> int:
        return self.number << INDEX_BITS


def plan(sources: Sequence[Source], shard_size: int) -> list[Slice]:
    """All slices, in the order of their rows. Of line files only the sizes are asked for, of large
    Parquet files also the footers. Raises InputFileError for a footer that cannot be read."""
    return [
        Slice(number, spans, size) for number, (spans, size) in enumerate(_cut(sources, shard_size))
    ]


def _cut(sources: Sequence[Source], shard_size: int) -> Iterator[tuple[tuple[Span, ...], int]]:
    most = shard_size * SLICE_BYTES_PER_ROW
    waiting: list[Span] = []
    waiting_bytes = 0
    for index, source in enumerate(sources):
        is_small = source.size is not None and source.size <= most
        if waiting and not (is_small and waiting_bytes + (source.size or 0) <= most):
            yield tuple(waiting), waiting_bytes
            waiting, waiting_bytes = [], 0
        if is_small:
            waiting.append(Span(index, 0, None))
            waiting_bytes += source.size or 0
        elif source.size is None:
            yield (Span(index, 0, None),), 0
        elif source.kind is Kind.PARQUET:
            groups = row_groups(source)
            if len(sources) > 1:
                source.close()  # it is opened again when it is its turn
            for begin, end in _runs(groups, shard_size):
                share = sum(groups[begin:end]) / max(sum(groups), 1)
                yield (Span(index, begin, end),), int(source.size * share)
        else:
            for begin in range(0, source.size, most):
                end = min(begin + most, source.size)
                yield (Span(index, begin, end),), end - begin
    if waiting:
        yield tuple(waiting), waiting_bytes


def _runs(rows: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Row groups that follow one another, of no more than `most` rows, or a larger one alone."""
    begin = total = 0
    for number, count in enumerate(rows):
        if number > begin and total + count > most:
            yield begin, number
            begin, total = number, 0
        total += count
    if rows:
        yield begin, len(rows)
