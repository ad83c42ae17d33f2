"""The input of a run as a file: how it is opened, which kind it is, and that it can be read again.

Knows nothing of rows.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from model.errors import FileError
from model.user_files import HEAD_BYTES, UTF8_MARK, check_encoding, kind_of, open_regular
from server.api import json_text

_SNIFFED_BYTES = 1 << 20
"""How long a first line may be for its content to tell the kind of file."""


class Kind(StrEnum):
    """What an input file holds."""

    TEXT = "text"
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"


_SUFFIXES = {
    **dict.fromkeys(("", ".txt", ".text", ".md", ".log"), Kind.TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl", ".json"), Kind.JSON_LINES),
    **dict.fromkeys((".parquet", ".pq"), Kind.PARQUET),
}
_PARQUET_MAGIC = b"PAR1"
_FOREIGN = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first (gunzip -k FILE)"),
    (b"BZh", "compressed with bzip2: unpack it first (bunzip2 -k FILE)"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first (unxz -k FILE)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first (unzstd FILE)"),
    (b"PK\x03\x04", "a zip archive or an Office file, not text"),
    (b"ARROW1", "an Arrow file: write it as Parquet"),
    (b"\x93NUMPY", "a NumPy file, not text"),
    (b"%PDF-", "a PDF, not text"),
)
_STREAMS = re.compile(r"-|/dev/stdin|/dev/fd/(\d{1,9})|/proc/self/fd/(\d{1,9})")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An input that is open and can be read again from its beginning, one reading at a time.

    It stays the file that was opened, whatever takes its name later.
    """

    name: str  # as the user wrote it
    kind: Kind
    named: os.stat_result  # of what the name or the redirection stands for: a file or a pipe
    file: BinaryIO

    def at(self, number: int) -> str:
        """The name of a row in messages."""
        return f"{self.name}, {'row' if self.kind is Kind.PARQUET else 'line'} {number}"

    def sha256(self) -> str:
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_stream(name: str) -> bool:
    """Whether this is standard input or another pipe of the shell's, such as <(…)."""
    return name == "-" or (_STREAMS.fullmatch(name) is not None and not Path(name).is_file())


@contextmanager
def opened(name: str) -> Iterator[Source]:
    """The input called `name`; a stream is first copied to an unnamed temporary file.

    Raises FileError or OSError.
    """
    with ExitStack() as stack:
        if is_stream(name):
            copy, named = _copy_of_stream(name)
            file = stack.enter_context(copy)
        else:
            file = stack.enter_context(open_regular(Path(name)))
            named = os.fstat(file.fileno())
        yield Source(name, _kind(name, is_stream(name), file), named, file)


def _copy_of_stream(name: str) -> tuple[BinaryIO, os.stat_result]:
    match = _STREAMS.fullmatch(name)
    assert match is not None, name
    number = int(match[1] or match[2] or 0)
    named = os.fstat(number)
    mode = named.st_mode
    if os.isatty(number):
        raise FileError(f"{name} is a terminal: send a file through a pipe, or name one")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise FileError(f"{name} is {kind_of(mode)}, not a file or a pipe")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with os.fdopen(os.dup(number), "rb") as stream:
        shutil.copyfileobj(stream, copy)
    return copy, named


def _kind(name: str, unnamed: bool, file: BinaryIO) -> Kind:
    """By the name and by the content; where these two contradict each other, neither is believed.

    What is unknown is refused: taken for text, other formats give vectors of their syntax.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    suffix = "" if unnamed else Path(name).suffix.lower()
    if head.startswith(_PARQUET_MAGIC):
        return Kind.PARQUET
    for magic, words in _FOREIGN:
        if head.startswith(magic):
            raise FileError(f"{name} is {words}")
    if suffix not in _SUFFIXES:
        raise FileError(
            f"{name}: unknown kind of file {suffix!r}; text is .txt, JSON lines are .jsonl, and "
            "Parquet is .parquet (through a pipe the content tells: nv-embed encode - -o OUT < "
            "FILE)"
        )
    kind = _SUFFIXES[suffix]
    if kind is Kind.PARQUET:
        raise FileError(f"{name} is no Parquet file: it does not begin with PAR1")
    check_encoding(head, name)
    if kind is Kind.TEXT and _begins_with_object(file):
        if not unnamed and suffix:
            raise FileError(
                f"{name} is called text, but its first line is a JSON object: name it .jsonl (to "
                "embed the lines as they stand, make them JSON strings: jq -R . FILE > FILE.jsonl)"
            )
        return Kind.JSON_LINES
    if kind is Kind.TEXT and _ends_lines_in_cr(file):
        raise FileError(f"{name}: its lines end in CR alone: convert it (tr '\\r' '\\n')")
    return kind


def _ends_lines_in_cr(file: BinaryIO) -> bool:
    """As on old Macs: all texts would be one."""
    file.seek(0)
    first = file.readline(_SNIFFED_BYTES)
    return not first.endswith(b"\n") and b"\r" in first.rstrip(b"\r")


def _begins_with_object(file: BinaryIO) -> bool:
    file.seek(0)
    while line := file.readline(_SNIFFED_BYTES):
        if text := line.removeprefix(UTF8_MARK).strip():
            try:
                return text.startswith(b"{") and isinstance(json_text.loads(text), dict)
            except ValueError:
                return False
    return False
