"""Which part of a run this process does: the I-th of N. Cheap to import."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """Every `of`-th slice, from `number` on, which counts from 1."""

    number: int
    of: int
    is_whole: bool = False  # nobody asked for parts; 1/1 is a part, which goes on by itself

    @property
    def tag(self) -> str:
        return f"{self.number}-of-{self.of}"

    def has(self, slice_number: int) -> bool:
        return slice_number % self.of == self.number - 1


WHOLE = Part(1, 1, is_whole=True)
