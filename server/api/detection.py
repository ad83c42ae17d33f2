"""A text that a client has written its own instruction into, as the model's family writes it.

Some libraries put `Instruct: …` and `Query: ` before a query themselves, and some of them turn
its newline into a space. Taken as a text, the instruction would be pooled with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from model.families import Family
from server.engine.interface import Input, PromptedText

_MOST_CHARS = 2000
"""Of a description."""


class WrittenPrompts:
    """Finds them in the inputs of one model."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._before = self._pattern = None
        if family.template is not None and not family.markers:
            before, _, behind = family.template.partition("{task}")
            self._before = before.split("\n")[0]
            opening, closing = (
                re.escape(part).replace("\\\n", "[\n ]") for part in (before, behind)
            )
            task = f"([^\n]{{1,{_MOST_CHARS}}}?)"
            self._pattern = re.compile(opening + task + closing)

    def split(self, inputs: Sequence[Input]) -> Sequence[Input]:
        """The inputs, with a PromptedText in the place of each text that has one."""
        if self._before is None or not any(self._has_one(item) for item in inputs):
            return inputs
        return [self._split(item) if self._has_one(item) else item for item in inputs]

    def _has_one(self, item: Input) -> bool:
        assert self._before is not None
        return isinstance(item, str) and item.startswith(self._before)

    def _split(self, item: Input) -> Input:
        assert self._pattern is not None
        assert isinstance(item, str)
        found = self._pattern.match(item)
        if found is None or found.end() == len(item):
            return item
        return PromptedText(self._family.prompt("query", found[1]), item[found.end() :])
