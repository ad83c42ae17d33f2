"""The nouns of a run: what is embedded and where to, its rows, and the work on some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding
from model.tokenizer import Truncation
from server.offline.columns import NONE, Columns
from server.offline.part import WHOLE, Part
from server.offline.parts import Parts
from server.offline.places import Place, Refused
from server.offline.sources import Source
from server.offline.vector_files import VectorFormat

Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Job:
    """What is embedded, how, and where to. `target` is a file, or a folder for shards."""

    target: Path
    is_folder: bool
    format: VectorFormat
    field: str
    truncate: Truncation
    shard_size: int
    skip: bool = False  # refused rows are listed, and the run goes on
    part: Part = WHOLE
    columns: Columns = NONE

    @property
    def manifest(self) -> Path:
        if self.is_folder:
            return self.target / "manifest.json"
        return self.target.with_name(self.target.name + ".manifest.json")

    @property
    def skipped(self) -> Path:
        """The list of the rows that were refused."""
        if self.is_folder:
            return self.target / "skipped.jsonl"
        return self.target.with_name(self.target.name + ".skipped.jsonl")

    @property
    def is_part(self) -> bool:
        return not self.part.is_whole

    def parts(self, mode: int) -> Parts:
        """Where the shards are; mode: of every file that is written."""
        folder = self.target if self.is_folder else Path(f"{self.target}.parts")
        return Parts(folder, self.format.suffix, mode, self.part.tag if self.is_part else "")

    @property
    def to_remove(self) -> Path:
        """What must go, so that the job can begin anew."""
        return self.target if self.is_folder else self.manifest


@dataclass(frozen=True, slots=True)
class Rows(Generic[Row]):
    """The rows of an input: `read` those of a span, `key` is all that a row's output depends on,
    and `weight` the bytes that it takes."""

    read: Callable[[Source, Place], Iterator[Row | Refused]]
    key: Callable[[Row], bytes]
    weight: Callable[[Row], int]


class Refusal(NamedTuple):
    """Of a shard's row: which one of the shard, where it stands, and why it was refused."""

    row: int
    span: int
    number: int
    why: str


class Work(Protocol):
    """The rows of one shard, tokenized."""

    @property
    def encodings(self) -> list[Encoding]: ...

    @property
    def refusals(self) -> list[Refusal]: ...

    @property
    def rows(self) -> int:
        """How many rows `write` writes."""
        ...

    def check(self, indices: Sequence[int], rows: NDArray[np.float32], lost: Sequence[int]) -> None:
        """Look at a batch's vectors as it is done; lost: indices that did not fit into memory."""
        ...

    def write(self, file: BinaryIO, vectors: NDArray[np.float32]) -> None: ...


class Tokenize(Protocol[Row_contra]):
    def __call__(self, rows: Sequence[Row_contra], indices: Sequence[int], /) -> Work:
        """indices: of each row in the output; see Chunk."""
        ...
