"""The files of one run: shards that are proven.

Nothing here is believed for its name. A shard counts when the ledger has its size and hash, and
when it was made of the same rows; temporary files have names that nobody can guess. Knows neither
models nor what a shard holds.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from model.errors import FileError
from model.user_files import TEMPORARY, open_regular, replacing_bytes
from server.offline.kept_rows import Keeper

_LEDGER = ".ledger.jsonl"
_OURS = re.compile(r"part-\d{5,}\.(npy|jsonl|parquet)|\.part-\d{5,}\.kept|\.ledger\.jsonl")


class OutputError(Exception):
    """The output cannot be written, or must not be; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which rows of the input one shard holds; `digest` (sha256, hex) proves that they are."""

    number: int
    first: int
    rows: int
    digest: str


@dataclass(frozen=True, slots=True)
class Parts:
    """The folder of a run's shards, `suffix` being theirs and `mode` that of all files in it."""

    folder: Path
    suffix: str
    mode: int

    def make(self) -> None:
        """Raises OutputError for a link, which may have been placed by somebody else."""
        self._refuse_link()
        self.folder.mkdir(exist_ok=True)

    def _refuse_link(self) -> None:
        if self.folder.is_symlink():
            raise OutputError(f"{self.folder} is a symbolic link: remove it")

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}{self.suffix}"

    def replacing(self, target: Path) -> AbstractContextManager[BinaryIO]:
        """A file that takes the target's name when the block ends well, and else vanishes."""
        return replacing_bytes(target, self.mode, self.folder)

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

    def sweep(self, *, finished: bool = False) -> None:
        """Remove the temporary files that a killed run may have left; `finished`: also what only
        a run that goes on needs."""
        for entry in list(os.scandir(self.folder)):
            needed = entry.name == _LEDGER or entry.name.endswith(".kept")
            if entry.name.startswith(TEMPORARY) or (finished and needed):
                os.unlink(entry.path)

    @property
    def is_empty(self) -> bool:
        """Whether no row has been kept here."""
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return not any(name.startswith("part-") or name.endswith(".kept") for name in names)

    def keeper(self, shard: Shard, width: int, every: float) -> Keeper:
        path = self.folder / f".part-{shard.number:05}.kept"
        return Keeper(path, shard.digest, width, every, self.mode)


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


def proves(proof: Proof | None, shard: Shard, path: Path) -> bool:
    return proof is not None and proof.made_of == shard.digest and proof.holds(path)


class Ledger:
    """The proofs of a run's shards, one a line, each on disk before the next shard begins."""

    def __init__(self, parts: Parts, proofs: dict[int, Proof] | None = None) -> None:
        """What an earlier run has noted, and `proofs`. Half a line, of a killed run, is none."""
        self._path = parts.folder / _LEDGER
        self.proofs = {**(proofs or {}), **self._read()}
        with parts.replacing(self._path) as file:
            file.writelines(self._line(number) for number in self.proofs)

    def has(self, shard: Shard, path: Path) -> bool:
        """Whether the shard is there, whole, and of these rows."""
        return proves(self.proofs.get(shard.number), shard, path)

    def note(self, number: int, proof: Proof) -> None:
        self.proofs[number] = proof
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(self._path, flags), "ab") as file:
            file.write(self._line(number))
            file.flush()
            os.fsync(file.fileno())

    def _line(self, number: int) -> bytes:
        proof = self.proofs[number]
        return orjson.dumps([number, proof.size, proof.sha256, proof.made_of]) + b"\n"

    def _read(self) -> dict[int, Proof]:
        try:
            with open_regular(self._path) as file:
                lines = file.read().splitlines()
        except (FileNotFoundError, FileError):
            return {}
        proofs = {}
        for line in lines:
            with suppress(ValueError, TypeError):
                number, *rest = orjson.loads(line)
                proofs[int(number)] = Proof(*rest)
        return proofs
