"""What an adapter is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class At:
    """What a client's user sets. `url` has no `/v1`; `argument` is the adapter's own."""

    url: str
    key: str
    model: str
    argument: str = ""

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True, slots=True)
class Ways:
    """`query` is None where the client has no method of its own for questions."""

    passages: Callable[[list[str]], Sequence[Any]]
    query: Callable[[str], Any] | None = None


@dataclass(frozen=True, slots=True)
class Ranks:
    """`scores`: of each text to the question, in the order of the texts."""

    scores: Callable[[str, list[str]], Sequence[Any]]


def in_order(ranked: Any, index: str, score: str) -> list[float]:
    """Scores in the order of the texts, of results that are objects or dictionaries."""

    def read(result: Any, name: str) -> Any:
        return result[name] if isinstance(result, dict) else getattr(result, name)

    return [read(result, score) for result in sorted(ranked, key=lambda one: read(one, index))]
