"""One output file, grown shard by shard, so that its rows are on disk once.

A shard is written as a file of its own, its body is put behind those that are here, and then it
goes. What was put here is noted with its hash: a run that goes on cuts off what is not proven.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from model.user_files import open_regular
from server.offline import notes
from server.offline.parts import Parts, Proof, Shard, Written, written_of
from server.offline.vector_files import Body, VectorFormat

_BLOCK = 1 << 20


class _Piece(NamedTuple):
    """A shard's body within the file."""

    shard: Written
    start: int
    body: Body
    sha256: str


class Joined:
    """The file while it grows. Shards are added in their order."""

    def __init__(self, parts: Parts, form: VectorFormat, run: str) -> None:
        """run: what the vectors were made by; a file of another run is none of ours."""
        self._parts, self._format, self._run = parts, form, run
        self._path = parts.joined
        self._notes = parts.joined_notes
        self._pieces: list[_Piece] = []
        self._proof: Proof | None = None  # of the whole file, when it is finished

    @property
    def shards(self) -> list[Written]:
        return [piece.shard for piece in self._pieces]

    def read(self, target: Path, is_known: Callable[[Written], bool]) -> None:
        """What an earlier run has put here, as far as it is still what it noted; `target` is where
        the finished file was going. is_known: whether all else is known of a shard."""
        pieces, whole = self._noted()
        known = list(takewhile(lambda piece: is_known(piece.shard), pieces))
        if len(known) < len(pieces):
            pieces, whole = known, None
        if whole is not None and not self._path.exists() and whole.holds(target):
            self._proof = whole
        elif not self._path.is_file() or self._path.is_symlink():
            return
        else:
            pieces = list(self._proven(pieces))
        self._pieces = pieces

    def open(self) -> None:
        """Cut off what is not proven, and note what is."""
        if self._proof is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self._path, flags, self._parts.mode), "r+b") as file:
                file.truncate(self._end)
        with self._parts.replacing(self._notes) as file:
            file.write(notes.line_of({"run": self._run}))
            file.writelines(notes.line_of(_fields_of(piece)) for piece in self._pieces)
            if self._proof is not None:
                file.write(notes.line_of(_fields_of_proof(self._proof)))

    @property
    def _end(self) -> int:
        last = self._pieces[-1] if self._pieces else None
        return 0 if last is None else last.start + last.body.size

    def has(self, shard: Shard, place: int) -> bool:
        """Whether the place-th that is here is this shard; where it is another, that and all
        behind it are forgotten."""
        if place >= len(self._pieces):
            return False
        if self._pieces[place].shard.is_of(shard):
            return True
        self.cut(place)
        return False

    def cut(self, place: int) -> None:
        """Forget the place-th shard and all behind it."""
        if place < len(self._pieces):
            del self._pieces[place:]
            self._proof = None

    def add(self, shard: Written) -> None:
        """Put a shard's file behind the others, and remove it."""
        path = self._parts.path(shard.key)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        with open_regular(path) as part, os.fdopen(os.open(self._path, flags), "r+b") as file:
            body = self._format.body(part)
            start = self._end or len(self._format.head(part, 0))
            if not self._pieces:
                file.write(self._format.head(part, 0))
            file.truncate(start)
            file.seek(start)
            digest = _copy(part, file, body)
            file.flush()
            os.fsync(file.fileno())
        piece = _Piece(shard, start, body, digest)
        notes.append(self._notes, _fields_of(piece))
        self._pieces.append(piece)
        path.unlink(missing_ok=True)

    def finish(self, target: Path) -> Proof:
        """The file with its head and its tail, under the name of the target."""
        if self._proof is not None:
            return self._proof
        rows = sum(piece.shard.vectors for piece in self._pieces)
        with self._path.open("r+b") as file:
            head = self._format.head(file, rows)  # it begins as its first shard did
            file.truncate(self._end)
            file.seek(self._end)
            bodies = [piece.body for piece in self._pieces]
            file.write(self._format.tail(bodies, [piece.start for piece in self._pieces]))
            file.seek(0)
            file.write(head)
            file.flush()
            os.fsync(file.fileno())
            self._proof = Proof.of(file)
        notes.append(self._notes, _fields_of_proof(self._proof))
        os.replace(self._path, target)
        return self._proof

    def _noted(self) -> tuple[list[_Piece], Proof | None]:
        pieces: list[_Piece] = []
        whole, is_ours = None, False
        for _, found in notes.read(self._notes):
            try:
                if "run" in found:
                    is_ours = found["run"] == self._run
                elif is_ours and "whole" in found:
                    whole = Proof(*found["whole"])
                elif is_ours:
                    pieces.append(_piece_of(found))
            except (ValueError, TypeError, KeyError):
                break
        return pieces, whole

    def _proven(self, pieces: list[_Piece]) -> Iterator[_Piece]:
        with open_regular(self._path) as file:
            for piece in pieces:
                file.seek(piece.start)
                digest = hashlib.sha256()
                left = piece.body.size
                while left and (block := file.read(min(left, _BLOCK))):
                    digest.update(block)
                    left -= len(block)
                if left or digest.hexdigest() != piece.sha256:
                    return
                yield piece


def _copy(part: BinaryIO, file: BinaryIO, body: Body) -> str:
    """Returns the body's hash."""
    part.seek(body.begin)
    digest, left = hashlib.sha256(), body.size
    while left:
        block = part.read(min(left, _BLOCK))
        assert block, (body, left)
        digest.update(block)
        file.write(block)
        left -= len(block)
    return digest.hexdigest()


def _fields_of(piece: _Piece) -> dict[str, object]:
    tail = base64.b64encode(piece.body.tail).decode()
    return {
        "shard": list(piece.shard),
        "start": piece.start,
        "body": [piece.body.begin, piece.body.size, tail],
        "sha256": piece.sha256,
    }


def _piece_of(fields: dict[str, object]) -> _Piece:
    begin, size, tail = fields["body"]  # type: ignore[misc]
    body = Body(begin, size, base64.b64decode(tail))  # type: ignore[has-type]
    return _Piece(
        written_of(fields["shard"]),  # type: ignore[arg-type]
        int(fields["start"]),  # type: ignore[call-overload]
        body,
        str(fields["sha256"]),
    )


def _fields_of_proof(proof: Proof) -> dict[str, object]:
    return {"whole": [proof.size, proof.sha256, proof.made_of]}
