"""What stands around a text: the template of a family, or what a caller wrote verbatim.

A template's markers (bge-en-icl's `<query>`) are tokens of their own; the same characters in a
user's text stay text. So a prompt is kept in parts, and never as one string. Torch-free, and knows
no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Marker:
    """A special token that a template writes."""

    token: str


Parts = tuple[str | Marker, ...]
"""Texts and markers in their order; no text is empty, and no two follow one another."""


@dataclass(frozen=True, slots=True)
class Example:
    """A query of a task and what answers it: a few of them show a model what is meant."""

    instruction: str
    query: str
    response: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """Before and behind a text. Without anything: the text alone."""

    prefix: Parts = ()
    suffix: Parts = ()
    examples: Parts = ()
    """Before the prefix; they do not count towards an input's limit."""
    round_trip: bool = False
    """Whether prefix and text are tokenized, cut, decoded and tokenized again, as the authors of
    bge-en-icl do."""
    num_chars: int = field(init=False, compare=False, repr=False)
    """Counted once: each request asks a few times."""

    def __post_init__(self) -> None:
        count = num_chars(self.examples) + num_chars(self.prefix) + num_chars(self.suffix)
        object.__setattr__(self, "num_chars", count)

    def __bool__(self) -> bool:
        return self.num_chars > 0


def num_chars(parts: Parts) -> int:
    return sum(len(part.token) if isinstance(part, Marker) else len(part) for part in parts)


NO_PROMPT = Prompt()


def verbatim(text: str, markers: Sequence[str] = ()) -> Parts:
    """The parts of a text in which `markers` are meant as such."""
    if not markers:
        return (text,) if text else ()
    pieces = re.split("(" + "|".join(map(re.escape, markers)) + ")", text)
    return tuple(Marker(piece) if piece in markers else piece for piece in pieces if piece)


def filled(template: Parts, **values: str) -> Parts:
    """The template with each `{name}` replaced, by text that stays text."""
    names = re.compile("|".join(re.escape(f"{{{name}}}") for name in values))
    return joined(
        *(
            (part if isinstance(part, Marker) else names.sub(lambda m: values[m[0][1:-1]], part),)
            for part in template
        )
    )


def joined(*parts: Parts) -> Parts:
    """End to end; texts that meet become one."""
    whole: list[str | Marker] = []
    for part in (part for some in parts for part in some):
        if isinstance(part, str) and whole and isinstance(whole[-1], str):
            whole[-1] += part
        elif part != "":
            whole.append(part)
    return tuple(whole)


def written(parts: Parts) -> str:
    """As a person reads it."""
    return "".join(part.token if isinstance(part, Marker) else part for part in parts)
