"""One input of a run: how it is opened, which kind it is, and that it stays what it was.

A file of any size is read from any byte; a stream once, from its beginning. Knows nothing of rows.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from model.errors import FileError
from model.user_files import HEAD_BYTES, UTF8_MARK, kind_of, open_regular
from server.offline.kinds import SNIFFED_BYTES, Kind, by_suffix, kind_of_content

_STREAMS = re.compile(r"-|/dev/stdin|/dev/fd/(\d{1,9})|/proc/self/fd/(\d{1,9})")


class ChangedError(Exception):
    """The input is not what it was when the run began; the message names it."""


class Source:
    """An input. While it is open it stays the file that was opened, whatever takes its name.

    size: bytes, None of a stream. named: of what the name or the redirection stands for, None of a
    URL. before: a byte (or row group) and how many lines (rows) lie before it, as far as read.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        size: int | None,
        named: os.stat_result | None,
        opener: Callable[[], BinaryIO],
        *,
        file: BinaryIO | None = None,
        head: bytes | None = None,
        is_sure: bool = True,
        is_copy: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        """is_sure: whether its content was looked at, or the kind is what its suffix says.
        is_copy: of a stream, which nobody else can change. check: of what is no local file, raises
        ChangedError."""
        self.name, self.kind, self.size, self.named = name, kind, size, named
        self.before = (0, 0)
        self._opener, self._file, self._head, self._is_sure = opener, file, head, is_sure
        self._is_once = is_copy or size is None  # it cannot be opened again
        self._check = check
        self._parquet: Any = None

    @property
    def is_stream(self) -> bool:
        return self.size is None

    def at(self, number: int) -> str:
        """The name of a row in messages."""
        return f"{self.name}, {'row' if self.kind is Kind.PARQUET else 'line'} {number}"

    def open(self) -> BinaryIO:
        """The file, wherever the last reading left it. Raises FileError, OSError, ChangedError."""
        if self._file is None:
            self._file = self._opener()
            self.check_unchanged()
        if not self._is_sure:
            # Looked at without being taken: nothing is read twice.
            head = self._file.peek(HEAD_BYTES)[:HEAD_BYTES]  # type: ignore[attr-defined]
            found = kind_of_content(self.name, False, io.BytesIO(head))
            if found is not self.kind:
                raise FileError(f"{self.name} is {found}, which its suffix does not say: rename it")
            self._is_sure = True
        return self._file

    def parquet(self, made: Callable[[BinaryIO], Any]) -> Any:
        """What `made` makes of the open file, once."""
        if self._parquet is None:
            self._parquet = made(self.open())
        return self._parquet

    def close(self) -> None:
        """What cannot be opened again stays."""
        if self._file is not None and not self._is_once:
            self.end()

    def end(self) -> None:
        """Nobody reads it any more."""
        if self._file is not None:
            self._parquet = None
            self._file.close()
            self._file = None

    def head(self, size: int) -> bytes:
        """How it begins; of a stream what was looked at, which may be less."""
        if self._head is not None:
            return self._head[:size]
        file = self.open()
        file.seek(0)
        return file.read(size)

    def check_unchanged(self) -> None:
        """Raises ChangedError for a local file of another size, time or number, and for what its
        store says so of."""
        if self._check is not None:
            self._check()
        if self._file is None or self.named is None or self._is_once:
            return
        if self._stamp(os.fstat(self._file.fileno())) != self._stamp(self.named):
            raise ChangedError(f"{self.name} changed while it was read")

    @staticmethod
    def _stamp(status: os.stat_result) -> tuple[int, ...]:
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_stream(name: str) -> bool:
    """Whether this is standard input or another pipe of the shell's, such as <(…)."""
    return name == "-" or (_STREAMS.fullmatch(name) is not None and not Path(name).is_file())


def stream_number(name: str) -> int:
    """The descriptor of a stream."""
    match = _STREAMS.fullmatch(name)
    assert match is not None, name
    return int(match[1] or match[2] or 0)


@contextmanager
def opened(name: str) -> Iterator[Source]:
    """The input called `name`, a local file or a stream. Raises FileError or OSError."""
    with ExitStack() as stack:
        source = stream(name) if is_stream(name) else local(name)
        stack.callback(source.end)
        source.open()
        yield source


def local(name: str, *, looked_at: bool = True) -> Source:
    """A local file; looked_at: its content tells its kind, and it stays open. Else its suffix
    does, which its content must not contradict when it is first read."""

    def opener() -> BinaryIO:
        return open_regular(Path(name))

    if not looked_at:
        named = os.stat(name)
        return Source(name, by_suffix(name), named.st_size, named, opener, is_sure=False)
    file = opener()
    try:
        named = os.fstat(file.fileno())
        return Source(
            name, kind_of_content(name, False, file), named.st_size, named, opener, file=file
        )
    except BaseException:
        file.close()
        raise


def remote(
    name: str, size: int, opener: Callable[[], BinaryIO], check: Callable[[], None]
) -> Source:
    """What a URL names, by its suffix; check: raises ChangedError."""
    return Source(name, by_suffix(name), size, None, opener, is_sure=False, check=check)


class _Replayed(io.RawIOBase):
    """A stream whose beginning was read already."""

    def __init__(self, head: bytes, stream: BinaryIO) -> None:
        self._head, self._stream = memoryview(head), stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._head:
            count = min(len(buffer), len(self._head))
            buffer[:count] = self._head[:count]
            self._head = self._head[count:]
            return count
        data = self._stream.read1(len(buffer))  # type: ignore[attr-defined]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def stream(name: str) -> Source:
    """Read once, as it comes; Parquet, whose end tells what it holds, from an unnamed copy."""
    number = stream_number(name)
    named = os.fstat(number)
    mode = named.st_mode
    if os.isatty(number):
        raise FileError(f"{name} is a terminal: send a file through a pipe, or name one")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise FileError(f"{name} is {kind_of(mode)}, not a file or a pipe")
    pipe = os.fdopen(os.dup(number), "rb")
    head = _head_of(pipe)
    kind = kind_of_content(name, True, io.BytesIO(head))
    whole = io.BufferedReader(_Replayed(head, pipe), 1 << 16)

    def gone() -> BinaryIO:
        raise ChangedError(f"{name} was read already, and a pipe is read once")

    if kind is not Kind.PARQUET:
        return Source(name, kind, None, named, gone, file=cast("BinaryIO", whole), head=head)
    with whole:
        copy = tempfile.TemporaryFile()  # noqa: SIM115 (the Source closes it)
        shutil.copyfileobj(whole, copy)
    copied = cast("BinaryIO", copy)
    return Source(name, kind, copy.tell(), named, gone, file=copied, is_copy=True)


def _head_of(stream: BinaryIO) -> bytes:
    """What tells the kind: some bytes and a line that is not blank, or all there is."""
    head = b""
    while len(head) < SNIFFED_BYTES:
        found = stream.read1(SNIFFED_BYTES)  # type: ignore[attr-defined]
        head += found
        has_line = b"\n" in head.removeprefix(UTF8_MARK).lstrip()
        if not found or (len(head) >= HEAD_BYTES and has_line):
            break
    return head
