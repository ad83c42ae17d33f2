"""How vectors are written: a shard of them, and one file made of shards.

Knows nothing of models or inputs, nor when a file takes its name (server/offline/parts.py).
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import orjson
from numpy.typing import NDArray

from server.offline.text_files import import_parquet


class VectorFormat(ABC):
    """How rows of vectors are written, and how shards become one file."""

    suffix: ClassVar[str]

    @abstractmethod
    def write(self, file: BinaryIO, vectors: NDArray[np.float32], first: int) -> None:
        """vectors [N, D] of the rows first, first+1, …"""

    @abstractmethod
    def join(self, file: BinaryIO, shards: Sequence[Path], rows: int) -> None:
        """All shards, in order, as one file of `rows` rows."""


class Npy(VectorFormat):
    """float32 [rows, D]."""

    suffix = ".npy"

    def write(self, file: BinaryIO, vectors: NDArray[np.float32], first: int) -> None:
        self._header(file, *vectors.shape)
        # Not numpy's own writing: it does not tell a full disk from other failures.
        file.write(np.ascontiguousarray(vectors, dtype="<f4").data)

    def join(self, file: BinaryIO, shards: Sequence[Path], rows: int) -> None:
        self._header(file, rows, np.load(shards[0], mmap_mode="r").shape[1])
        for shard in shards:
            with shard.open("rb") as part:
                np.lib.format.read_magic(part)  # type: ignore[no-untyped-call]
                np.lib.format.read_array_header_1_0(part)  # type: ignore[no-untyped-call]
                shutil.copyfileobj(part, file, 1 << 20)

    @staticmethod
    def _header(file: BinaryIO, rows: int, width: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]


class JsonLines(VectorFormat):
    """{"index": …, "embedding": […]} a line."""

    suffix = ".jsonl"

    def write(self, file: BinaryIO, vectors: NDArray[np.float32], first: int) -> None:
        for index, vector in enumerate(vectors, first):
            line = {"index": index, "embedding": vector}
            file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    def join(self, file: BinaryIO, shards: Sequence[Path], rows: int) -> None:
        for shard in shards:
            with shard.open("rb") as part:
                shutil.copyfileobj(part, file, 1 << 20)


class Parquet(VectorFormat):
    """Columns `index` (int64) and `embedding` (a list of D float32); a row group per shard."""

    suffix = ".parquet"

    def write(self, file: BinaryIO, vectors: NDArray[np.float32], first: int) -> None:
        parquet, arrow = import_parquet(), _import_arrow()
        flat = arrow.array(vectors.ravel())
        table = arrow.table(
            {
                "index": arrow.array(np.arange(first, first + len(vectors))),
                "embedding": arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            }
        )
        parquet.write_table(table, file)

    def join(self, file: BinaryIO, shards: Sequence[Path], rows: int) -> None:
        parquet = import_parquet()
        with parquet.ParquetWriter(file, parquet.read_schema(shards[0])) as writer:
            for shard in shards:  # not read_table: it takes a folder's name, a=1, for a column
                with parquet.ParquetFile(shard) as part:
                    writer.write_table(part.read())


FORMATS: dict[str, VectorFormat] = {f.suffix: f for f in (Npy(), JsonLines(), Parquet())}


def _import_arrow() -> Any:
    import pyarrow

    return pyarrow
