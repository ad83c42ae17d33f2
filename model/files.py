"""Opens the small files of a checkpoint: regular ones of a bounded size, as UTF-8 text or JSON.

A file that is not what its name says (a Git LFS pointer, a page of a failed download, an archive)
is named as what it is. Knows nothing of what the files hold.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any

from model.errors import CheckpointError, MissingFileError

_SHOWN = 100
"""Characters of a value from a file that a message repeats."""


def open_regular(path: Path, most_bytes: int | None = None) -> BufferedReader:
    """Open a file to read its bytes. Raises MissingFileError, or CheckpointError for what is no
    file: a FIFO would wait for its writer for ever, and a device never ends."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise CheckpointError(f"{path} is {kind}")
        if most_bytes is not None and found.st_size > most_bytes:
            raise CheckpointError(f"{path} is larger than {most_bytes >> 20} MiB")
        return path.open("rb")
    except FileNotFoundError:
        if path.is_symlink():
            to = path.readlink()
            raise CheckpointError(f"{path} leads to {to}, which does not exist") from None
        raise MissingFileError(f"{path} cannot be read: it does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_text(path: Path, most_bytes: int) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises CheckpointError."""
    with open_regular(path, most_bytes) as file:
        try:
            raw = file.read(most_bytes)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    if what := impostor(raw):
        raise CheckpointError(f"{path} cannot be read: it is {what}")
    if b"\0" in raw:
        raise CheckpointError(f"{path} cannot be read: it is no text, or UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} cannot be read: it is not UTF-8") from None


def read_json(path: Path, most_bytes: int = 1 << 20) -> Any:
    """The value of a JSON file. Raises CheckpointError, also for an object that has a key twice."""
    return parse_json(read_text(path, most_bytes), path)


def parse_json(text: str | bytes, path: Path) -> Any:
    """The value of JSON that was found in `path`. Raises CheckpointError."""
    try:
        return json.loads(text, object_pairs_hook=without_repetition)
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a name that stands twice: which was meant?"""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it has {shown(name)} twice")
        found[name] = value
    return found


def impostor(head: bytes) -> str | None:
    """What a file is that begins with these bytes, where it is neither JSON nor safetensors."""
    start = head[:512].lstrip().lower()
    if not head:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML or XML page, probably of a failed download"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"BZh")):
        return "an archive (zip, gzip or another): unpack it"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16: save it as UTF-8"
    if not head[:512].strip(b"\0"):
        return "full of zeros, probably of a broken download"
    return None


def shown(value: object) -> str:
    """`value` of a file for a message: on one line, and not endless."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of thousands of digits
        return f"an unprintable {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def listed(names: Iterable[str]) -> str:
    """Names for a message, the first ten of them."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 10} more" if len(ordered) > 10 else ""
    return ", ".join(ordered[:10]) + more
