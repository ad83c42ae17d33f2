"""Words into values: the parser whose errors are one line, and the numbers that options take.

Knows no command and no option.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

from model.errors import did_you_mean
from server.errors import SettingsError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What a command adds itself to."""
_LARGEST = 10_000_000


class Parser(argparse.ArgumentParser):
    """Its errors are SettingsErrors of one line, which name the nearest of the known values."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        raise SettingsError(f"{message.removeprefix('argument ')} ({self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own says nothing of a help that could not be written, and exits 0."""
        print(message, end="", file=file or sys.stderr)


def whole_number(least: int, most: int = _LARGEST) -> Callable[[str], int]:
    """A whole number of an option, within bounds."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text[:64]!r}") from None
        if not least <= number <= most:
            bound = f"at least {least}" if number < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text[:64]}")
        return number

    return read


def number(least: float, most: float) -> Callable[[str], float]:
    """A number of an option, within bounds."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (found := float(text)) <= most:
                return found
        raise argparse.ArgumentTypeError(
            f"must be a number from {least:g} to {most:g}, not {text[:64]!r}"
        )

    return read


def words(known: Sequence[str] = ()) -> Callable[[str], tuple[str, ...]]:
    """Several words with commas between them, each once; known: there are no others."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(word.strip() for word in text.split(","))
        for place, word in enumerate(found):
            if not word or word in found[:place]:
                raise argparse.ArgumentTypeError(
                    f"{text[:64]!r} has {'a word twice' if word else 'an empty word'}"
                )
            if known and word not in known:
                hint = did_you_mean(word, known)
                raise argparse.ArgumentTypeError(
                    f"must be some of {', '.join(known)}, not {word[:64]!r}{hint}"
                )
            if not re.fullmatch(r"[^\W\d_][\w '()-]{0,39}", word):
                raise argparse.ArgumentTypeError(f"{word[:64]!r} is no name")
        return found

    return read


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) <= 1 and math.isfinite(number):
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, not {text[:64]!r}")
