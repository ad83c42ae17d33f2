"""The rows of a shard that is not finished, on disk so that a run that ends loses little of them.

A record that was cut off or changed is none, and neither are those of another shard's rows.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

_RECORD = struct.Struct("<III")  # how many, their width, CRC-32 of what follows


class Keeper:
    """Rows of one shard that is not finished, kept at least every so many seconds.

    A context manager: on its way out by an exception, Ctrl-C included, it keeps what it has.
    """

    def __init__(self, path: Path, digest: str, width: int, every: float, mode: int) -> None:
        """digest: sha256, in hex, of the input rows. width: D. every: seconds. mode: the file's."""
        self._path, self._every, self._mode, self._width = path, every, mode, width
        self._header = bytes.fromhex(digest)
        self._waiting: list[tuple[Sequence[int], NDArray[np.float32]]] = []
        self._last = time.monotonic()
        self.rows = 0  # kept on disk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            with suppress(OSError):  # a full disk, perhaps: that is what is reported already
                self.flush()

    def recall(self, vectors: NDArray[np.float32]) -> set[int]:
        """Fill `vectors` [N, D] with what was kept of these very rows; returns their indices."""
        done: set[int] = set()
        for indices, rows in self._records():
            if len(indices) and max(indices) < len(vectors):
                vectors[indices] = rows
                done.update(indices.tolist())
        if not done:
            self.forget()  # of other rows, or broken
        self.rows = len(done)
        return done

    def add(self, indices: Sequence[int], rows: NDArray[np.float32]) -> None:
        self._waiting.append((indices, rows))
        if time.monotonic() - self._last >= self._every:
            self.flush()

    def flush(self) -> None:
        self._last = time.monotonic()
        if not self._waiting:
            return
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._path, flags, self._mode), "ab") as file:
            if not file.tell():
                file.write(self._header)
            for indices, rows in self._waiting:
                body = np.asarray(indices, dtype="<i4").tobytes() + rows.astype("<f4").tobytes()
                file.write(_RECORD.pack(len(indices), self._width, zlib.crc32(body)) + body)
            file.flush()
            os.fsync(file.fileno())
        self.rows += sum(len(indices) for indices, _ in self._waiting)
        self._waiting.clear()

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)

    def _records(self) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
        """The whole records, up to one that is cut off or changed."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        with os.fdopen(descriptor, "r+b") as file:
            if file.read(len(self._header)) != self._header:
                return
            good = file.tell()
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                count, width, checksum = _RECORD.unpack(head)
                size = 4 * count * (1 + width)
                if width != self._width or size > os.fstat(file.fileno()).st_size:
                    break
                body = file.read(size)
                if len(body) != size or zlib.crc32(body) != checksum:
                    break
                good = file.tell()
                indices = np.frombuffer(body, "<i4", count)
                yield indices, np.frombuffer(body, "<f4", offset=4 * count).reshape(count, width)
            file.truncate(good)  # the next record begins where a whole one ended
