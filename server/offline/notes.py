"""What a run notes of its work: a line a note, with a checksum, in files that only grow.

A line that was cut off or changed is no note, whatever it says: what it stood for is done again.
Knows not what is noted.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from model.errors import FileError
from model.user_files import open_regular


def line_of(value: object) -> bytes:
    raw = orjson.dumps(list(value) if isinstance(value, tuple) else value)
    return b"%08x %b\n" % (zlib.crc32(raw), raw)


def read(path: Path) -> Iterator[tuple[int, Any]]:
    """Where each line begins, and what it says; None of one that is no note. None are there where
    there is no file."""
    at = 0
    try:
        with open_regular(path) as file:
            for line in file:
                yield at, _value_of(line)
                at += len(line)
    except (FileNotFoundError, FileError):
        return


def read_one(path: Path, at: int) -> Any:
    """The note that begins there; None where none does."""
    try:
        with open_regular(path) as file:
            file.seek(at)
            return _value_of(file.readline())
    except (FileNotFoundError, FileError):
        return None


def append(path: Path, value: object) -> int:
    """It is on disk when this returns where it begins. Raises FileNotFoundError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "ab") as file:
        at = file.tell()
        file.write(line_of(value))
        file.flush()
        os.fsync(file.fileno())
    return at


def _value_of(line: bytes) -> Any:
    checksum, _, raw = line.removesuffix(b"\n").partition(b" ")
    try:
        return orjson.loads(raw) if int(checksum, 16) == zlib.crc32(raw) else None
    except ValueError:
        return None
