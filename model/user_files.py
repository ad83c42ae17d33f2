"""Opening the files that a user names: regular ones only, and text in UTF-8.

A FIFO would make the process wait, a device need not end, and text in another encoding would be
taken for other words. Knows nothing of what the text means.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from model.errors import FileError

UTF8_MARK = b"\xef\xbb\xbf"
"""The byte-order mark that Windows' editors put in front of UTF-8. It is no part of the text."""
HEAD_BYTES = 4096
"""How much of a file's beginning tells its encoding."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_WIDE_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_PAGES = bytes(byte for byte in range(32) if byte not in b"\r\n")
"""High bytes of UTF-16: of all alphabets, but for two whose number is that of a line's end."""


def open_regular(path: Path) -> BinaryIO:
    """The bytes of a regular file (or of one that a link leads to).

    Raises FileError for a folder, FIFO, socket or device, at once; OSError as `open` does.
    """
    _check_regular(path, os.stat(path).st_mode)  # opening a device may do something
    # O_NONBLOCK: what has become a FIFO since does not make us wait.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)
    except FileError:
        file.close()
        raise
    return file


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is {kind_of(mode)}, not a file")


def kind_of(mode: int) -> str:
    """What is there in place of a regular file, in words; mode: `st_mode`."""
    return next((words for test, words in _KINDS if test(mode)), "no regular file")


def check_encoding(head: bytes, name: object) -> None:
    """Raises FileError when a file that begins with `head` is UTF-16 or UTF-32, marked or not."""
    encoding = next((e for mark, e in _WIDE_MARKS if head.startswith(mark)), None)
    if encoding is None and _is_unmarked_utf16(head):
        encoding = "UTF-16LE" if head[1::2].count(0) > head[::2].count(0) else "UTF-16BE"
    if encoding is not None:
        raise FileError(
            f"{name} is {encoding}, not UTF-8: convert it first "
            f"(iconv -f {encoding} -t UTF-8 FILE > NEWFILE)"
        )


def _is_unmarked_utf16(head: bytes) -> bool:
    """Whether every other byte is a script's number: mostly NUL (Latin), 4 (Cyrillic), …

    Such text is valid UTF-8, with NULs between its letters. A text that holds a NUL here and there
    is none of it.
    """
    if 0 not in head[:HEAD_BYTES]:
        return False
    sides = (head[:HEAD_BYTES][0::2], head[:HEAD_BYTES][1::2])
    return any(0 in side and 2 * sum(map(side.count, _PAGES)) > len(side) for side in sides)


def read_text(path: Path) -> str:
    """All of a text file, without its mark. Raises FileError or OSError."""
    with open_regular(path) as file:
        raw = file.read()
    check_encoding(raw, path)
    raw = raw.removeprefix(UTF8_MARK)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise FileError(f"{path}, line {line}: not UTF-8: convert the file first") from None
