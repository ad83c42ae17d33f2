"""What the writers of a run have noted of its shards and slices, each in a ledger of its own.

All ledgers are read. Which rows were refused may be much, and stays on disk: it is read for a
shard at a time. Knows nothing of how rows are read, nor of what a shard holds.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from server.offline import notes
from server.offline.parts import (
    Key,
    OutputError,
    Parts,
    Refusals,
    Shard,
    SliceEnd,
    Written,
    end_of,
    written_of,
)


class ForgottenError(OutputError):
    """Nobody tells any more which rows of a shard were refused."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(
            f"the notes in {parts.folder} changed while they were read; the same command with "
            "--resume goes on"
        )


@dataclass(slots=True)
class Ledger:
    """Shards, without what was refused of them, and slices that were read to their end.

    Each note is on disk before the next shard begins. `run` names what all of them depend on: what
    others have noted under another name is not read.
    """

    parts: Parts
    run: str = ""
    shards: dict[Key, Written] = field(default_factory=dict)
    ends: dict[int, SliceEnd] = field(default_factory=dict)
    _places: dict[Key, tuple[str, int]] = field(default_factory=dict)
    """Of the notes of shards with refused rows: the name of the file, and where in it."""
    _own: set[Key | int] = field(default_factory=set)
    """Shards and slices that this writer has noted: what others' ledgers say of them is older."""

    def read(self) -> None:
        """All ledgers that are there; the one of a complete run first, for others know better."""
        first = self.parts.ledger_of_refused.name
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in sorted(
                os.listdir(self.parts.folder), key=lambda name: (name != first, name)
            ):
                if name.startswith(".ledger") and name.endswith(".jsonl"):
                    self._read(name)

    def open(self) -> None:
        """Begin this writer's own, with all that is known."""
        places: dict[Key, tuple[str, int]] = {}
        with self.parts.replacing(self.parts.ledger) as file:
            file.write(notes.line_of({"run": self.run}))
            for key, one in list(self.shards.items()):
                try:
                    whole = self._whole(one)
                except ForgottenError:  # another writer has found the folder complete
                    del self.shards[key]
                    continue
                if whole.refused:
                    places[key] = self.parts.ledger.name, file.tell()
                file.write(notes.line_of(whole))
            file.writelines(map(notes.line_of, self.ends.values()))
        self._places = places

    def keep(self, keys: Iterable[Key]) -> None:
        """What stays of all ledgers, of these shards: what the manifest does not say. Raises
        ForgottenError."""
        with self.parts.replacing(self.parts.ledger_of_refused) as file:
            file.write(notes.line_of({"run": self.run}))
            wholes = (self._whole(self.shards[key]) for key in keys)
            file.writelines(notes.line_of(one) for one in wholes if one.refused)

    def has(self, shard: Shard) -> bool:
        """Whether the shard is there, whole, and of these rows."""
        found = self.shards.get(shard.key)
        return (
            found is not None
            and found.is_of(shard)
            and self.tells_refused(found)
            and found.proof.holds(self.parts.path(shard.key))
        )

    def tells_refused(self, one: Written) -> bool:
        """Whether somebody has noted which of its rows were refused."""
        return one.rows == one.vectors or one.key in self._places

    def refused(self, one: Written) -> Refusals:
        """Those of a shard, from disk. Raises ForgottenError."""
        if one.rows == one.vectors:
            return ()
        name, at = self._places.get(one.key, ("", 0))
        with suppress(ValueError, TypeError):
            found = written_of(notes.read_one(self.parts.folder / name, at)) if name else None
            if found is not None and found._replace(refused=()) == one:
                return found.refused
        raise ForgottenError(self.parts)

    def note(self, what: Written | SliceEnd) -> None:
        if isinstance(what, SliceEnd) and self.ends.get(what.slice) == what:
            return
        try:
            at = notes.append(self.parts.ledger, what)
        except FileNotFoundError:  # parts of another number have found the folder complete
            self._own.clear()
            self.read()
            self.open()
            at = notes.append(self.parts.ledger, what)
        self._know(what, self.parts.ledger.name, at)
        self._own.add(_key_of(what))

    def _whole(self, one: Written) -> Written:
        return one._replace(refused=self.refused(one))

    def _read(self, name: str) -> None:
        """Half a line, of a killed run, is none."""
        run = None
        for at, value in notes.read(self.parts.folder / name):
            if isinstance(value, dict):
                run = value.get("run")
            elif isinstance(value, list) and run == self.run:
                with suppress(ValueError, TypeError):
                    is_end = len(value) == len(SliceEnd._fields)
                    what = end_of(value) if is_end else written_of(value)
                    if name == self.parts.ledger.name or _key_of(what) not in self._own:
                        self._know(what, name, at)

    def _know(self, what: Written | SliceEnd, name: str, at: int) -> None:
        if isinstance(what, SliceEnd):
            self.ends[what.slice] = what
            return
        self.shards[what.key] = what._replace(refused=())
        self._places.pop(what.key, None)
        if what.refused:
            self._places[what.key] = name, at


def _key_of(what: Written | SliceEnd) -> Key | int:
    return what.slice if isinstance(what, SliceEnd) else what.key
