"""Where the rows of an input stand, and which are refused. Knows nothing of how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from server.offline.kinds import Kind
from server.offline.sources import Source


class InputFileError(Exception):
    """A row of the input cannot be used; the message holds its number."""


@dataclass(slots=True, eq=False)
class Place:
    """A span of an input while it is read; `begin` and `end` as Span has them.

    Its rows are numbered from 1. `before` is how many lines (rows of Parquet) of the file lie
    before it, None where nobody has counted; `lines` and `read` (a share) say how far it was read.
    """

    name: str
    kind: Kind
    begin: int = 0
    end: int | None = None
    span: int = 0  # within its slice
    skip: bool = False  # refused rows are yielded, not raised
    before: int | None = 0
    lines: int = 0
    read: float = 0.0

    @property
    def size(self) -> int | None:
        return None if self.end is None else self.end - self.begin

    def at(self, number: int) -> str:
        """The name of a row in messages: by its number in the file, where that is known."""
        what = "row" if self.kind is Kind.PARQUET else "line"
        if self.before is None:
            return f"{self.name}, {what} {number} after byte {self.begin}"
        return f"{self.name}, {what} {self.before + number}"

    def refused(self, number: int, why: str) -> Refused:
        """Raises InputFileError unless refused rows are skipped."""
        if not self.skip:
            raise InputFileError(f"{self.at(number)}: {why}")
        return Refused(self, number, why)


class Refused(NamedTuple):
    """A row that cannot be used, and why; never what it holds."""

    place: Place
    number: int
    why: str


class Line(NamedTuple):
    """One text, the number of its line (of its row in Parquet), and what is kept beside it."""

    place: Place
    number: int
    text: str
    values: tuple[Any, ...] = ()


def place_of(
    source: Source, begin: int = 0, end: int | None = None, *, span: int = 0, skip: bool = False
) -> Place:
    known = {0: 0, source.before[0]: source.before[1]}
    return Place(source.name, source.kind, begin, end, span, skip, known.get(begin))
