"""The files of one run: which are its own, which shards are proven, what goes at its end.

Nothing here is believed for its name. A shard counts when a ledger of the same run
(server/offline/ledger.py) has its size and hash, and when it was made of the same rows; temporary
files have names that nobody can guess. Several writers share a folder. Knows neither models nor
what a shard holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from model.user_files import TEMPORARY, replacing_bytes
from server.offline.kept_rows import Keeper

_SHARD = r"part-(\d{5,})-(\d{5,})\.(npy|jsonl|jsonl\.gz|jsonl\.zst|parquet)"
_STATE = r"\.part-[\d-]+(\.\d+-of-\d+)?\.kept|\.ledger[\w-]*\.jsonl|\.joined(\.jsonl)?"
_LOCK = re.compile(r"\.part-(\d+-of-\d+)\.lock")
_WRITING = re.compile(rf"{re.escape(TEMPORARY)}(?:(\d+-of-\d+)-)?.*")
"""A temporary file, and the tag of its writer."""
_OURS = re.compile(rf"{_SHARD}|{_STATE}|part-\d{{5,}}\.(npy|jsonl|parquet)")

Key = tuple[int, int]
"""Of a shard: its slice, and which of the slice's it is."""
Refusals = tuple[tuple[int, int, int, str], ...]
"""Of a shard's rows: which row of the shard, span, number in the span, why."""


class OutputError(Exception):
    """The output cannot be written, or must not be; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which rows of the input one shard holds: of slice `slice`, from row `first` on; `digest`
    (sha256, hex) proves that they are."""

    slice: int
    number: int
    first: int
    rows: int
    digest: str

    @property
    def key(self) -> Key:
        return self.slice, self.number


class SliceEnd(NamedTuple):
    """A slice that was read: how many shards it has, and rows and lines of each of its spans."""

    slice: int
    shards: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """What is known of a file that was written: its size, its hash, and the rows within."""

    size: int
    sha256: str
    made_of: str = ""  # Shard.digest

    @classmethod
    def of(cls, file: BinaryIO, made_of: str = "") -> Proof:
        file.flush()
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return cls(file.tell(), digest, made_of)

    def holds(self, path: Path) -> bool:
        """Whether the file is still the one that was written."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size != self.size:
                return False
            return Proof.of(file).sha256 == self.sha256


class Written(NamedTuple):
    """A shard that is on disk: rows of the input, rows of the output, and those that were refused.

    Once it is noted, `refused` is empty, for that may be much: see Ledger.refused.
    """

    slice: int
    number: int
    first: int
    rows: int
    vectors: int
    size: int
    sha256: str
    made_of: str
    refused: Refusals = ()

    @property
    def key(self) -> Key:
        return self.slice, self.number

    @property
    def proof(self) -> Proof:
        return Proof(self.size, self.sha256, self.made_of)

    def is_of(self, shard: Shard) -> bool:
        """Whether it was made of these very rows, in this place."""
        mine = (self.key, self.first, self.rows, self.made_of)
        return mine == (shard.key, shard.first, shard.rows, shard.digest)


@dataclass(frozen=True, slots=True)
class Parts:
    """The folder of a run's shards, `suffix` being theirs and `mode` that of all files in it.

    tag: of the writer, where several share the folder.
    """

    folder: Path
    suffix: str
    mode: int
    tag: str = ""

    def make(self) -> None:
        """Raises OutputError for a link, which may have been placed by somebody else."""
        self._refuse_link()
        self.folder.mkdir(exist_ok=True)

    def _refuse_link(self) -> None:
        if self.folder.is_symlink():
            raise OutputError(f"{self.folder} is a symbolic link: remove it")

    def path(self, key: Key) -> Path:
        return self.folder / f"part-{key[0]:05}-{key[1]:05}{self.suffix}"

    @property
    def ledger(self) -> Path:
        return self.folder / (f".ledger-{self.tag}.jsonl" if self.tag else ".ledger.jsonl")

    @property
    def ledger_of_refused(self) -> Path:
        """What stays of the ledgers when all shards are there."""
        return self.folder / ".ledger-refused.jsonl"

    @property
    def joined(self) -> Path:
        """One file while it grows."""
        return self.folder / ".joined"

    @property
    def joined_notes(self) -> Path:
        """What is noted of it."""
        return self.folder / ".joined.jsonl"

    def replacing(self, target: Path, *, new: bool = False) -> AbstractContextManager[BinaryIO]:
        """A file that takes the target's name when the block ends well, and else vanishes."""
        return replacing_bytes(target, self.mode, self.folder, tag=self._temporary, new=new)

    @property
    def _temporary(self) -> str:
        return f"{self.tag}-" if self.tag else ""

    def clear(self) -> None:
        """Remove what runs have left here, and the folder if nothing else is in it."""
        self._refuse_link()
        with suppress(FileNotFoundError, NotADirectoryError):
            for entry in list(os.scandir(self.folder)):
                ours = _OURS.fullmatch(entry.name) or entry.name.startswith(TEMPORARY)
                if ours and not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
            with suppress(OSError):
                self.folder.rmdir()

    def sweep(self) -> None:
        """Remove the temporary files that a killed run of this writer may have left."""
        for entry in list(os.scandir(self.folder)):
            if entry.name.startswith(TEMPORARY + self._temporary):
                _remove(entry.path)

    def finish(self, names: Iterable[str]) -> None:
        """With all shards there: remove what only a run that goes on needs, shards that are not
        among `names`, of an input that was another, and what writers that were killed have left;
        those that still write find out by themselves."""
        kept = set(names)
        entries = list(os.scandir(self.folder))
        for entry in entries:
            ours = _OURS.fullmatch(entry.name) and entry.name not in kept
            if ours or self._is_of_the_dead(entry.name):
                _remove(entry.path)
        for entry in entries:
            if (lock := _LOCK.fullmatch(entry.name)) and lock[1] != self.tag:
                self._is_held(lock[1])

    def _is_of_the_dead(self, name: str) -> bool:
        """Whether nobody writes this temporary file any more."""
        found = _WRITING.fullmatch(name)
        if found is None:
            return False
        return found[1] in (None, self.tag) or not self._is_held(found[1])

    def lock_of(self, tag: str) -> Path:
        """Held by the writer `tag` for as long as it lives."""
        return self.folder / f".part-{tag}.lock"

    def _is_held(self, tag: str) -> bool:
        """Whether the writer lives, or nothing tells. The lock of one that was killed goes."""
        path = self.lock_of(tag)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(f"{path}")
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    @property
    def is_empty(self) -> bool:
        """Whether no row has been kept here."""
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return True
        with suppress(OSError):
            if self.joined_notes.read_bytes().count(b"\n") > 1:  # what run it is, and a shard
                return False
        return not any(name.startswith("part-") or name.endswith(".kept") for name in names)

    def keeper(self, shard: Shard, width: int, every: float, run: str = "") -> Keeper:
        """run: what the vectors were made by; those of another are not believed."""
        tag = f".{self.tag}" if self.tag else ""
        path = self.folder / f".part-{shard.slice:05}-{shard.number:05}{tag}.kept"
        digest = hashlib.sha256(f"{run} {shard.digest}".encode()).hexdigest()
        return Keeper(path, digest, width, every, self.mode)


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):  # another writer was quicker
        os.unlink(path)


def written_of(fields: Sequence[object]) -> Written:
    """What a file says of a shard. Raises TypeError, ValueError for what is none."""
    *numbers, sha256, made_of, refusals = fields
    if not (_are_counts(numbers) and isinstance(sha256, str) and isinstance(made_of, str)):
        raise TypeError(fields)
    refused = []
    for row, span, line, why in refusals:  # type: ignore[attr-defined]
        if not (_are_counts((row, span, line)) and isinstance(why, str)):
            raise TypeError(fields)
        refused.append((row, span, line, why))
    return Written(*numbers, sha256, made_of, tuple(refused))  # type: ignore[call-arg, arg-type]


def end_of(fields: Sequence[object]) -> SliceEnd:
    """The same of a slice."""
    number, shards, spans = fields
    if not _are_counts((number, shards)):
        raise TypeError(fields)
    found = []
    for rows, lines in spans:  # type: ignore[attr-defined]
        if not _are_counts((rows, lines)):
            raise TypeError(fields)
        found.append((rows, lines))
    return SliceEnd(number, shards, tuple(found))  # type: ignore[arg-type]


def _are_counts(values: Iterable[object]) -> bool:
    return all(type(one) is int and one >= 0 for one in values)
