"""What a call names as its input: files, patterns, folders, standard input and URLs, in order.

Owns how names become sources. Knows nothing of rows or outputs.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from server.errors import SettingsError
from server.offline import sources
from server.offline.sources import Source

logger = logging.getLogger("nv_embed.encode")

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://.+|([a-z][a-z0-9+.-]+)://", re.DOTALL)
_IN_FOLDERS = (".txt", ".text", ".jsonl", ".ndjson", ".jsonlines", ".jl", ".parquet", ".pq")
"""What a folder's files are taken for by their suffix; a README.md within is no input."""
_REMOTE_BYTES = 256 << 10
"""Of one request to a store."""
_OPENED_AT_ONCE = 16
"""Up to so many files are looked at before anything begins, and stay open."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_PACKAGES |= {"abfs": "adlfs", "abfss": "adlfs", "http": "aiohttp", "https": "aiohttp"}


def is_url(name: str) -> bool:
    return _URL.fullmatch(name) is not None


def has_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


@contextmanager
def opened(names: Sequence[str]) -> Iterator[list[Source]]:
    """All that `names` stand for. Raises SettingsError or FileError for what is not there, or is
    no file."""
    found = [maker for name in names for maker in _makers(name, alone=len(names) == 1)]
    with ExitStack() as stack:
        inputs = []
        for name, maker in found:
            source = _made(name, partial(maker, looked_at=len(found) <= _OPENED_AT_ONCE))
            stack.callback(source.end)
            if len(found) > _OPENED_AT_ONCE:
                source.close()  # it is opened again when it is its turn
            inputs.append(source)
        yield inputs


def folders_of(names: Sequence[str]) -> list[Path]:
    """Those of `names` that are local folders."""
    return [Path(name) for name in names if not is_url(name) and os.path.isdir(name)]


def _made(name: str, maker: Callable[[], Source]) -> Source:
    try:
        return maker()
    except FileNotFoundError:
        raise SettingsError(f"there is no file {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else None
        raise SettingsError(f"{name} cannot be read: {why or error}") from None


def _makers(name: str, *, alone: bool) -> list[tuple[str, Callable[..., Source]]]:
    """The files that one word stands for, sorted, with what opens each."""
    if sources.is_stream(name):
        return [(name, lambda looked_at: sources.stream(name))]
    if is_url(name):
        return _remote(name)
    try:
        if os.path.isdir(name):
            paths = _within(name)
        elif has_pattern(name) and not os.path.exists(name):
            paths = sorted(path for path in glob.glob(name, recursive=True) if _is_file(path))
            if not paths:
                raise SettingsError(f"there is no file {name}: nothing matches the pattern")
        else:
            paths = [name]
    except ValueError as error:
        raise SettingsError(f"{name} cannot be read: {error}") from None
    return [(path, partial(_local, path)) for path in paths]


def _local(name: str, *, looked_at: bool) -> Source:
    return sources.local(name, looked_at=looked_at or not Path(name).suffix)


def _is_file(path: str) -> bool:
    return not os.path.isdir(path)


def _within(folder: str) -> list[str]:
    """The files of known kinds in a folder and those below it, sorted. Hidden ones are none."""
    found: list[str] = []
    others: list[str] = []
    for at, below, names in os.walk(folder):
        below[:] = sorted(one for one in below if not one.startswith("."))
        for name in names:
            if not name.startswith("."):
                known = name.lower().endswith(_IN_FOLDERS)
                (found if known else others).append(os.path.join(at, name))
    _say_left_out(folder, others)
    if not found:
        raise SettingsError(f"{folder} holds no text: {', '.join(_IN_FOLDERS)} are read")
    return sorted(found)


def _say_left_out(folder: str, others: list[str]) -> None:
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        some = ", ".join(sorted(others)[:3])
        logger.warning("%s: files of other kinds are left out: %s%s", folder, some, more)


# URLs


class _Ranges(io.RawIOBase):
    """A file in a store, of which only the bytes that are asked for are fetched."""

    def __init__(self, files: Any, path: str, size: int) -> None:
        self._files, self._path, self._size, self._at = files, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._files.cat_file(self._path, start=self._at, end=end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _remote(url: str) -> list[tuple[str, Callable[..., Source]]]:
    scheme = url.partition("://")[0]
    files, path = _store(url, scheme)
    try:
        if has_pattern(url):
            paths = sorted(files.glob(path))
        elif files.isdir(path):
            every = sorted(files.find(path))
            paths = [one for one in every if one.lower().endswith(_IN_FOLDERS)]
            _say_left_out(url, [one for one in every if one not in paths])
        else:
            paths = [path]
        sizes = [files.info(path)["size"] for path in paths]
    except FileNotFoundError:
        raise SettingsError(f"there is no file {url}") from None
    except Exception as error:  # of the store's own kinds
        raise SettingsError(f"{url} cannot be read: {error}") from None
    if not paths:
        raise SettingsError(f"there is no file {url}")
    return [
        (one := files.unstrip_protocol(path), partial(_fetched, one, size, files, path))
        for path, size in zip(paths, sizes, strict=True)
    ]


def _fetched(name: str, size: int, files: Any, path: str, *, looked_at: bool) -> Source:
    def opener() -> BinaryIO:
        raw = _Ranges(files, path, size)
        return cast("BinaryIO", io.BufferedReader(raw, _REMOTE_BYTES))

    return sources.remote(name, size, opener)


def _store(url: str, scheme: str) -> tuple[Any, str]:
    """fsspec's file system, and the path within. Raises SettingsError with how to get it."""
    pip = shlex.join([sys.executable, "-m", "pip", "install"])
    try:
        import fsspec
    except ImportError:
        needed = f"fsspec {_PACKAGES.get(scheme, '')}".strip()
        raise SettingsError(f"{url} needs fsspec: {pip} {needed}") from None
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        how = f"{pip} {package}" if package else f"{error}"
        raise SettingsError(f"{url} needs another package: {how}") from None
    except ValueError as error:
        raise SettingsError(f"{url}: {error}") from None
    return files, path
