"""How vectors are written: a shard of them, and one file made of the bodies of shards.

A shard's file is a head, a body and a tail; bodies end to end, between a head and a tail of their
own, are one file of all rows. Knows nothing of models or inputs, nor when a file takes its name
(server/offline/parts.py).
"""

from __future__ import annotations

import gzip
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from server.api.vector_format import int8_scale, numbers
from server.offline import parquet_footer
from server.offline.parquet_files import import_parquet
from server.offline.times import array_of

OutputDtype = Literal["float32", "float16", "int8"]
Columns = Mapping[str, tuple[list[Any], Callable[[str], Any]]]
"""Values by column, with what tells the column's Arrow type."""


class Body(NamedTuple):
    """Where the rows of a shard's file are, and what its tail says of them."""

    begin: int
    size: int
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class VectorFormat(ABC):
    """How rows of vectors are written, and how shards become one file."""

    dtype: OutputDtype = "float32"
    compression: str | None = None  # None: as the format does by itself

    kind: ClassVar[str]
    compressions: ClassVar[tuple[str, ...]]

    @property
    def suffix(self) -> str:
        return f".{self.kind}"

    @abstractmethod
    def write(
        self,
        file: BinaryIO,
        vectors: NDArray[np.float32],
        indices: Sequence[int],
        columns: Columns | None = None,
    ) -> None:
        """vectors [N, D], the index of each, and what stands beside it."""

    @abstractmethod
    def body(self, file: BinaryIO) -> Body: ...

    def head(self, first: BinaryIO, rows: int) -> bytes:
        """What stands before the bodies; always as long. first: a shard that has `rows` rows."""
        return b""

    def tail(self, bodies: Sequence[Body], starts: Sequence[int]) -> bytes:
        """What stands behind the bodies; starts: where each begins in the one file."""
        return b""


class Npy(VectorFormat):
    """[rows, D]."""

    kind = "npy"
    compressions = ("none",)

    def write(
        self,
        file: BinaryIO,
        vectors: NDArray[np.float32],
        indices: Sequence[int],
        columns: Columns | None = None,
    ) -> None:
        written = numbers(vectors, self.dtype)
        file.write(self._header(*written.shape))
        # Not numpy's own writing: it does not tell a full disk from other failures.
        file.write(np.ascontiguousarray(written, dtype=self._descr).data)

    def body(self, file: BinaryIO) -> Body:
        begin = self._shape(file)[2]
        return Body(begin, file.seek(0, 2) - begin)

    def head(self, first: BinaryIO, rows: int) -> bytes:
        return self._header(rows, self._shape(first)[1])

    @property
    def _descr(self) -> str:
        return {"float32": "<f4", "float16": "<f2", "int8": "|i1"}[self.dtype]

    @staticmethod
    def _shape(file: BinaryIO) -> tuple[int, int, int]:
        """-> rows, width, where the header ends"""
        file.seek(0)
        np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
        header = np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
        rows, width = header[0]
        return rows, width, file.tell()

    def _header(self, rows: int, width: int) -> bytes:
        """Of one length for any number of rows: numpy leaves room."""
        header = {"descr": self._descr, "fortran_order": False, "shape": (rows, width)}
        written = io.BytesIO()
        np.lib.format.write_array_header_1_0(written, header)  # type: ignore[no-untyped-call]
        return written.getvalue()


class JsonLines(VectorFormat):
    """{"index": …, "embedding": […]} a line, other columns between the two."""

    kind = "jsonl"
    compressions = ("none", "gzip", "zstd")

    @property
    def suffix(self) -> str:
        return ".jsonl" + COMPRESSED.get(self.compression or "none", "")

    def write(
        self,
        file: BinaryIO,
        vectors: NDArray[np.float32],
        indices: Sequence[int],
        columns: Columns | None = None,
    ) -> None:
        beside = {name: values for name, (values, _) in (columns or {}).items()}
        written = numbers(vectors, self.dtype)
        with self.compressed(file) as target:
            for place, (index, vector) in enumerate(zip(indices, written, strict=True)):
                kept = {name: values[place] for name, values in beside.items()}
                line = {"index": index, **kept, "embedding": vector}
                target.write(
                    orjson.dumps(line, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
                )

    def compressed(self, file: BinaryIO) -> Any:
        """A file whose writing goes into `file`; one such after another is one stream again."""
        if self.compression == "gzip":
            return gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
        if self.compression == "zstd":
            import_parquet()
            import pyarrow

            sink = pyarrow.PythonFile(_KeptOpen(file), mode="w")
            return pyarrow.CompressedOutputStream(sink, "zstd")
        return _KeptOpen(file)

    def body(self, file: BinaryIO) -> Body:
        return Body(0, file.seek(0, 2))


COMPRESSED = {"gzip": ".gz", "zstd": ".zst"}


class Parquet(VectorFormat):
    """Columns `index` (int64), those that are kept, and `embedding` (a list of D numbers); a row
    group per shard."""

    kind = "parquet"
    compressions = ("zstd", "snappy", "gzip", "none")

    def write(
        self,
        file: BinaryIO,
        vectors: NDArray[np.float32],
        indices: Sequence[int],
        columns: Columns | None = None,
    ) -> None:
        parquet, arrow = import_parquet(), _import_arrow()
        width = vectors.shape[1]
        flat = arrow.array(numbers(vectors, self.dtype).ravel())
        beside = {
            name: array_of(values, type_of(name))
            for name, (values, type_of) in (columns or {}).items()
        }
        table = arrow.table(
            {
                "index": arrow.array(np.asarray(indices, dtype=np.int64)),
                **beside,
                "embedding": arrow.FixedSizeListArray.from_arrays(flat, width),
            }
        )
        if self.dtype == "int8":
            table = table.replace_schema_metadata({"int8_scale": f"{int8_scale(width)!r}"})
        parquet.write_table(table, file, compression=self.compression or "snappy")

    def body(self, file: BinaryIO) -> Body:
        begin, size, footer = parquet_footer.split(file)
        return Body(begin, size, footer)

    def head(self, first: BinaryIO, rows: int) -> bytes:
        return parquet_footer.MAGIC

    def tail(self, bodies: Sequence[Body], starts: Sequence[int]) -> bytes:
        shifts = [start - body.begin for body, start in zip(bodies, starts, strict=True)]
        return parquet_footer.joined([body.tail for body in bodies], shifts)


FORMATS: dict[str, type[VectorFormat]] = {f".{f.kind}": f for f in (Npy, JsonLines, Parquet)}


class _KeptOpen(io.RawIOBase):
    """A file that somebody else closes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)


def _plain(value: Any) -> Any:
    """What JSON has no form for: bytes in hexadecimal, others as they print."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _import_arrow() -> Any:
    import pyarrow

    return pyarrow
