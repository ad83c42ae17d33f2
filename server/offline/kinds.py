"""Which kind of file an input is: by its name and by its content, never by one against the other.

Knows nothing of how it is opened.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from model.errors import FileError
from model.user_files import HEAD_BYTES, UTF8_MARK, check_encoding
from server.api import json_text

SNIFFED_BYTES = 1 << 20
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


def by_suffix(name: str) -> Kind:
    suffix = Path(name).suffix.lower()
    if suffix not in _SUFFIXES:
        raise _unknown_suffix(name, suffix)
    return _SUFFIXES[suffix]


def _unknown_suffix(name: str, suffix: str) -> FileError:
    return FileError(
        f"{name}: unknown kind of file {suffix!r}; text is .txt, JSON lines are .jsonl, and "
        "Parquet is .parquet (through a pipe the content tells: nv-embed encode - -o OUT < "
        "FILE)"
    )


def kind_of_content(name: str, unnamed: bool, file: BinaryIO) -> Kind:
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
        raise _unknown_suffix(name, suffix)
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
    first = file.readline(SNIFFED_BYTES)
    return not first.endswith(b"\n") and b"\r" in first.rstrip(b"\r")


def _begins_with_object(file: BinaryIO) -> bool:
    file.seek(0)
    while line := file.readline(SNIFFED_BYTES):
        if text := line.removeprefix(UTF8_MARK).strip():
            try:
                return text.startswith(b"{") and isinstance(json_text.loads(text), dict)
            except ValueError:
                return False
    return False
