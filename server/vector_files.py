"""Writing bulk outputs: shards, each whole or absent, and one file made of them.

Knows nothing of models or inputs. A file takes its name only when it is complete.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import orjson
from numpy.typing import NDArray

from server.text_files import import_parquet


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the target's name when the block ends well, and vanishes otherwise."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
        np.save(file, vectors.astype("<f4"))

    def join(self, file: BinaryIO, shards: Sequence[Path], rows: int) -> None:
        width = np.load(shards[0], mmap_mode="r").shape[1]
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        for shard in shards:
            file.write(np.load(shard, mmap_mode="r").tobytes())


class JsonLines(VectorFormat):
    """{"index": …, "embedding": […]} a line."""

    suffix = ".jsonl"

    def write(self, file: BinaryIO, vectors: NDArray[np.float32], first: int) -> None:
        for index, vector in enumerate(vectors, first):
            line = {"index": index, "embedding": vector}
            file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")

    def join(self, file: BinaryIO, shards: Sequence[Path], rows: int) -> None:
        for shard in shards:
            file.write(shard.read_bytes())


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
            for shard in shards:
                writer.write_table(parquet.read_table(shard))


FORMATS: dict[str, VectorFormat] = {f.suffix: f for f in (Npy(), JsonLines(), Parquet())}


def _import_arrow() -> Any:
    import pyarrow

    return pyarrow
