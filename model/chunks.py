"""Which runs of a text's tokens get vectors of their own (late chunking). Pure; knows no tokenizer.

The text goes through the model once and whole, and each run is pooled by itself: its rows know
what stands around it (arXiv 2409.04701).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.errors import ModelError

Run = tuple[int, int]
"""From the first to behind the last."""


class ChunksError(ModelError):
    """A run that a text does not have. `index`: which; None: of no single one."""

    def __init__(self, message: str, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class Place(NamedTuple):
    """A token's characters in the text, and the first of them that is no space."""

    first: int
    end: int
    anchor: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """What a request asks for: so many tokens each, or runs of tokens or characters."""

    unit: Literal["size", "tokens", "characters"]
    size: int = 0
    runs: tuple[Run, ...] = ()

    def resolve(self, places: Sequence[Place]) -> list[tuple[Run, Run]]:
        """-> (tokens, characters) of each, for a text with these tokens. Raises ChunksError."""
        return [(run, _characters(places[run[0] : run[1]])) for run in self._runs(places)]

    def _runs(self, places: Sequence[Place]) -> list[Run]:
        if self.unit == "size":
            count, size = len(places), self.size
            return [(first, min(first + size, count)) for first in range(0, count, size)]
        if self.unit == "tokens":
            for index, (first, end) in enumerate(self.runs):
                if not 0 <= first < end <= len(places):
                    raise ChunksError(
                        f"[{first}, {end}] is no run of this text's {len(places)} tokens", index
                    )
            return list(self.runs)
        anchors = [place.anchor for place in places]
        length = max((place.end for place in places), default=0)
        runs = []
        for index, (first, end) in enumerate(self.runs):
            run = bisect_left(anchors, first), bisect_left(anchors, end)
            if first < 0 or run[0] >= run[1]:
                raise ChunksError(
                    f"[{first}, {end}] holds no token of this text's {length} characters", index
                )
            runs.append(run)
        return runs


def _characters(places: Sequence[Place]) -> Run:
    return places[0].anchor, places[-1].end


def own_places(offsets: Sequence[Run], written: str, before: int, length: int) -> list[Place]:
    """Of a text's tokens, by where they are in what was tokenized: the text has `length`
    characters, behind `before` others."""
    places: list[Place] = []
    for first, end in offsets:
        anchor = first
        while anchor < end - 1 and written[anchor].isspace():
            anchor += 1
        first, end, anchor = (min(max(at - before, 0), length) for at in (first, end, anchor))
        places.append(Place(first, end, max(anchor, places[-1].anchor) if places else anchor))
    return places
