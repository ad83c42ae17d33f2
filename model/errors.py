"""Errors of the model package.

ModelError
├── CheckpointError       the folder, its config or its tensors are not an NV-Embed we can run
│   ├── MissingFileError  a file of the folder is not there
│   └── UntoldFamilyError nothing in the folder says which family of models it is
├── FileError             a named file is no regular file, or its text is not UTF-8
├── PromptError           the model's family has no place for an instruction, or for examples
├── UnsupportedError      this machine or this build cannot do what was asked (kernel, dtype, …)
├── InputError            one input cannot be embedded; `index` tells which
│   ├── InputTooLongError more tokens than the limit, and no truncation asked for
│   └── EmptyPoolError    nothing is left to pool: the instruction fills the whole input
├── NonFiniteError        the model produced NaN or infinity for some inputs
└── NoMemoryError         some inputs do not fit into the device's memory, even alone
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class ModelError(Exception):
    """Base of every error that the model package raises on purpose."""


class CheckpointError(ModelError):
    """The checkpoint is missing, incomplete, or not one that this project supports."""


class FileError(ModelError):
    """What was named cannot be read as a file or as text; the message names it."""


class MissingFileError(CheckpointError):
    """A file that a checkpoint needs does not exist."""


class UntoldFamilyError(CheckpointError):
    """A trunk of which no file says what is made of it."""


class UnsupportedError(ModelError):
    """The device, dtype, kernel or quantization that was asked for does not work here."""


class PromptError(ModelError):
    """What was to stand around a text has no place in the model's template; `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class InputError(ModelError):
    """One input of several is at fault; `index` is its place, when it is known."""

    index: int | None = None


class InputTooLongError(InputError):
    """One input has more tokens than the limit.

    `num_tokens` is None when the text was refused by its length in characters, untokenized.
    """

    def __init__(self, num_tokens: int | None, max_tokens: int) -> None:
        self.num_tokens, self.max_tokens = num_tokens, max_tokens
        shown = f"more than {max_tokens}" if num_tokens is None else str(num_tokens)
        super().__init__(f"the input has {shown} tokens, the limit is {max_tokens}")


class EmptyPoolError(InputError):
    """All tokens of one input belong to its instruction (the reference computes 0/0 here)."""

    def __init__(self, pool_start: int, max_tokens: int) -> None:
        self.pool_start, self.max_tokens = pool_start, max_tokens
        super().__init__(
            f"the instruction takes {pool_start} tokens and the input is cut to {max_tokens}: "
            "nothing is left to embed"
        )


class NonFiniteError(ModelError):
    """Some vectors of a batch hold NaN or infinity; `rows` are their places in the input."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(f"the model returned a non-finite vector for {len(self.rows)} input(s)")


class NoMemoryError(ModelError):
    """Some inputs do not fit into the device's memory, even alone; `rows` are their places."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = tuple(rows)
        super().__init__(
            f"{len(self.rows)} input(s) do not fit into the device's memory, even alone "
            f"(the first is number {self.rows[0]}, from 0): shorten them"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name; empty when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
