"""Files in stores, by fsspec: their bytes in ranges, and whether each is still the same file.

What gives access to one is in no message. Knows neither rows nor kinds of files.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

from server.errors import SettingsError
from server.offline.places import InputFileError
from server.offline.sources import ChangedError

_REMOTE_BYTES = 256 << 10
"""Of one request to a store."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs"}
_PACKAGES |= {"abfs": "adlfs", "abfss": "adlfs", "http": "aiohttp", "https": "aiohttp"}

_USER = re.compile(r"(https?://)[^\s/?#'\"]*@|([a-z0-9]://)[^\s/?#'\"]*:[^\s/?#'\"]*@")
_WEB_QUERY = re.compile(r"(https?://[^?#'\"]*)[?#][^\s'\"]*")
_QUERY = re.compile(r"([a-z0-9]://[^?'\"]*)\?[^\s'\"]*=[^\s'\"]*")
"""In other stores than the web's a ? may be a sign of a pattern."""
_STAMPS = ("size", "ETag", "etag", "generation", "md5Hash", "mtime")
_LATER = ("LastModified", "last_modified", "Last-Modified", "updated")
"""What stores say of a file, and another one of that name has otherwise; _LATER: when it was
written."""


def shown(text: str) -> str:
    """Without what gives access: the query of its URLs, and the name and password in them.
    The container of Azure's abfs://container@account stays."""
    bare = _USER.sub(lambda found: found[1] or found[2], text)
    return _QUERY.sub(r"\1", _WEB_QUERY.sub(r"\1", bare))


class Stored:
    """A file in a store, and what the store said of it when the run began."""

    def __init__(self, name: str, files: Any, path: str, info: Mapping[str, Any]) -> None:
        self.name, self._files, self._path = name, files, path
        self.size: int = info["size"]
        self._stamp = _stamp(info)

    def open(self) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(_Ranges(self), _REMOTE_BYTES))

    def check(self) -> None:
        """Raises ChangedError for another file of that name, InputFileError when nobody says."""
        try:
            self._files.invalidate_cache(self._path)
            now = _stamp(self._files.info(self._path))
        except Exception as error:  # of the store's own kinds
            raise self._failed(error) from None
        if any(now.get(name) != value for name, value in self._stamp.items()):
            raise self._changed()

    def read(self, begin: int, end: int) -> bytes:
        try:
            data: bytes = self._files.cat_file(self._path, start=begin, end=end)
        except Exception as error:
            if "416" in f"{error}":  # there is nothing at this range any more
                self.check()
            raise self._failed(error) from None
        if len(data) > end - begin:
            raise InputFileError(f"{self.name}: the store sends no parts of a file: fetch it first")
        if len(data) < end - begin:
            raise self._changed()
        return data

    def _changed(self) -> ChangedError:
        return ChangedError(f"{self.name} changed while it was read")

    def _failed(self, error: Exception) -> InputFileError | ChangedError:
        error = real_error(self.name, error)
        if isinstance(error, FileNotFoundError):
            return ChangedError(f"{self.name} went away while it was read")
        why = shown(f"{error}") or type(error).__name__
        return InputFileError(
            f"{self.name} cannot be read: {why}; when it can, the same command with --resume goes "
            "on"
        )


def real_error(url: str, error: Exception) -> Exception:
    """What is behind a FileNotFoundError, which fsspec makes of every failure over HTTP."""
    cause = error.__cause__
    is_masked = isinstance(error, FileNotFoundError) and url.startswith("http")
    if is_masked and isinstance(cause, Exception) and getattr(cause, "status", 0) not in (404, 410):
        return cause
    return error


def _stamp(info: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: info[name] for name in (*_STAMPS, *_LATER) if info.get(name) is not None}
    if set(found) <= {"size"} and info.get("created") is not None:
        found["created"] = info["created"]
    return found


class _Ranges(io.RawIOBase):
    """Of a file in a store only the bytes that are asked for are fetched."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self._size, self._at = stored, stored.size, 0

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
        data = self._stored.read(self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def store_of(url: str, scheme: str) -> tuple[Any, str]:
    """fsspec's file system, and the path within. Raises SettingsError with how to get it."""
    pip = shlex.join([sys.executable, "-m", "pip", "install"])
    try:
        import fsspec
    except ImportError:
        needed = f"fsspec {_PACKAGES.get(scheme, '')}".strip()
        raise SettingsError(f"{shown(url)} needs fsspec: {pip} {needed}") from None
    try:
        files, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        how = f"{pip} {package}" if package else f"{error}"
        raise SettingsError(f"{shown(url)} needs another package: {how}") from None
    except ValueError as error:
        raise SettingsError(f"{shown(url)}: {shown(f'{error}')}") from None
    return files, path
