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

    def split(self, inputs: Sequence[Input]) -> tuple[Sequence[Input], int]:
        """The inputs, with a PromptedText in the place of each text that has one; and how many."""
        before, changed = self._before, 0
        if before is None:
            return inputs, 0
        result = inputs
        for index, item in enumerate(inputs):
            if not isinstance(item, str) or not item.startswith(before):
                continue
            split = self._split(item)
            if split is not None:
                result = result if changed else list(inputs)
                result[index] = split  # type: ignore[index]
                changed += 1
        return result, changed

    def _split(self, text: str) -> PromptedText | None:
        assert self._pattern is not None
        found = self._pattern.match(text)
        if found is None or found.end() == len(text):
            return None
        return PromptedText(self._family.prompt("query", found[1]), text[found.end() :])
