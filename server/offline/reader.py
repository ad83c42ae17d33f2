"""The slices of a run that this process reads, one after the other, and how far it has come; and
what others have to know of its inputs, to read the same."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple

from server.offline.job import Job, Row, Rows
from server.offline.kinds import Kind
from server.offline.parts import SliceEnd
from server.offline.shards import Chunk, Reading, chunks_of
from server.offline.slices import Slice, plan
from server.offline.sources import ChangedError, Source


class Input(NamedTuple):
    """One input as it was when the slices were cut: a slice names it by its place among all.

    changed: its time in ns, and number: its device's and its own on `machine`, None of a URL.
    """

    name: str
    kind: Kind
    size: int | None
    changed: int | None
    number: tuple[int, int] | None
    machine: str

    @classmethod
    def of(cls, source: Source) -> Input:
        status = source.named
        changed = None if status is None else status.st_mtime_ns
        number = None if status is None else (status.st_dev, status.st_ino)
        return cls(source.name, source.kind, source.size, changed, number, platform.node())

    def reopened(self, source: Source) -> Source:
        """`source`, which has the same name. Raises ChangedError where it is not the same."""
        now = Input.of(source)
        if now.machine != self.machine:  # elsewhere a shared file has another number
            now = now._replace(number=self.number, machine=self.machine)
        if now != self:
            raise ChangedError(f"{self.name} changed while it was read")
        return source


class Reader(Generic[Row]):
    """plan: all slices of the input; those of this part are read."""

    def __init__(self, job: Job, sources: Sequence[Source], rows: Rows[Row]) -> None:
        """Raises InputFileError for a Parquet file whose footer cannot be read."""
        self._job, self._sources, self._rows = job, sources, rows
        self.plan: list[Slice] = plan(sources, job.shard_size)
        self.mine = [one for one in self.plan if job.part.has(one.number)]
        self._bytes = sum(one.size for one in self.mine)
        self._bytes_before = 0
        self._reading = Reading()
        self._size = 0  # of the slice that is read

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return [source.name for source in self._sources]

    @property
    def inputs(self) -> list[Input]:
        return [Input.of(source) for source in self._sources]

    def chunks(self) -> Iterator[Chunk[Row] | SliceEnd]:
        """Anew with each call."""
        job, self._bytes_before = self._job, 0
        last: Source | None = None
        for which in self.mine:
            first = self._sources[which.spans[0].source]
            if last is not None and last is not first:
                last.close()
            last = self._sources[which.spans[-1].source]
            self._reading, self._size = Reading(), which.size
            yield from chunks_of(
                which,
                self._sources,
                self._rows,
                job.shard_size,
                skip=job.skip,
                reading=self._reading,
            )
            self._bytes_before += which.size
            self._size = 0

    def total(self, rows: int) -> int | None:
        """How many rows there are, by the share of the bytes that `rows` of them took; None where
        nothing tells, as of a stream."""
        read = self._bytes_before + self._size * self._reading.share
        return round(rows * self._bytes / read) if read else None
