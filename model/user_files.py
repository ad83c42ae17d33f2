"""The files that a user names. To read: regular ones only, and text in UTF-8. To write: whole or
not at all, by one run, and none of those that are read.

A FIFO would make the process wait, a device need not end, and text in another encoding would be
taken for other words. Knows nothing of what the text means.
"""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from model.errors import FileError

logger = logging.getLogger("nv_embed.files")

UTF8_MARK = b"\xef\xbb\xbf"
"""The byte-order mark that Windows' editors put in front of UTF-8. It is no part of the text."""
TEMPORARY = ".nv-embed-"
"""How the names of files begin that are being written."""
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

_NO_LINKS_HERE = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class LockedError(FileError):
    """Another run writes there."""


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


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Raises FileError where `path` cannot become a file: it is a folder, FIFO or device, or one of
    the inputs, by whatever name (links, another spelling). Raises OSError where none can be."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is {kind_of(status.st_mode)}: the output needs a file")
    for source in inputs:
        with suppress(OSError):  # its reading tells why
            if os.path.samestat(source.stat(), status):
                raise FileError(f"{path} is {source}, which is read: name another output")


def mode_like(read: int | None) -> int:
    """The permissions of an output: no more than those of what it was made of, whose texts it
    tells; read: their `st_mode`, None where there are none."""
    umask = os.umask(0o077)
    os.umask(umask)
    given = 0o666 if read is None else read & 0o666
    return (given & ~umask) | 0o600


@contextmanager
def replacing_bytes(
    path: Path, mode: int, folder: Path | None = None, *, tag: str = "", new: bool = False
) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when the block ends well, and else vanishes. Till then its
    name is one that nobody can guess, in `folder` or beside `path`, with `tag` in it.

    new: nothing may have the name already. Raises OSError, FileExistsError among them.
    """
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY + tag, dir=folder or path.parent)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            with suppress(PermissionError):  # file systems without modes; it is 0600 till here
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            _take_new_name(name, path)
        else:
            os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def _take_new_name(name: str, path: Path) -> None:
    """As os.replace, of several at once for one alone. Raises FileExistsError."""
    try:
        os.link(name, path)
    except OSError as error:
        if error.errno not in _NO_LINKS_HERE:
            raise
        if os.path.lexists(path):  # a file system without links: the best that it can do
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        os.replace(name, path)
    else:
        os.unlink(name)


@contextmanager
def replacing(path: Path, mode: int) -> Iterator[TextIO]:
    """The same for text in UTF-8."""
    with replacing_bytes(path, mode) as file:
        text = io.TextIOWrapper(file, encoding="utf-8")
        try:
            yield text
        finally:
            text.detach()  # flushes; the file is closed by its owner


@contextmanager
def locked(lock: Path, output: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other runs away from `output` until the block ends. Raises LockedError when one is
    there already. The lock goes with its process; a file that is left over locks nothing.

    shared: others that share it may be there, too.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        descriptor = os.open(lock, flags, 0o600)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise LockedError(
                f"another run is writing {output}: wait for it, or name another output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(descriptor)
                raise
            logger.warning("this file system has no locks: start no second run of %s", output)
        # Whoever held it before may have removed the file in between.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(lock, follow_symlinks=False), os.fstat(descriptor)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        if not shared or _is_alone(descriptor):
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _is_alone(descriptor: int) -> bool:
    """Whether nobody else holds a lock that is shared."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
