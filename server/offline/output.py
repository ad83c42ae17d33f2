"""Where the shards of a run go: a folder that keeps them, or one file that they are put into.

Owns what is there already, what is noted, and how it ends. Knows nothing of models or inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import orjson

from server.offline.job import Job
from server.offline.joined import Joined
from server.offline.ledger import ForgottenError, Ledger
from server.offline.manifest import made_of, noted_by, outcome, printable, skipped_rows
from server.offline.parts import Key, Parts, Shard, SliceEnd, Written
from server.offline.slices import Slice


class Output(ABC):
    """Of one run: `read` what is there, `has` for each shard in order, `open`, `take`, `end`."""

    def __init__(self, job: Job, parts: Parts) -> None:
        self._job, self._parts = job, parts
        self._ledger = Ledger(parts)
        self._ended: list[SliceEnd] = []
        self._is_open = False

    @property
    def ledger(self) -> Ledger:
        """What is known to be there. It can be sent to others, who ask it what they may leave."""
        return self._ledger

    def read(self, run: str, manifest: Mapping[str, Any]) -> None:
        """What an earlier run has left; run: what its vectors were made by."""
        self._ledger.run = run
        self._ledger.read()

    def open(self, run: str) -> None:
        """Begin to write."""
        self._ledger.run = run
        self._ledger.open()
        self._is_open = True
        for one in self._ended:
            self._ledger.note(one)

    def slice_ended(self, end: SliceEnd) -> None:
        if self._is_open:
            self._ledger.note(end)
        else:
            self._ended.append(end)

    def take(self, written: Written) -> None:
        """A shard that is on disk now."""
        self._ledger.note(written)

    @abstractmethod
    def placed(self, which: Slice, shard: Shard, rows: int) -> tuple[Shard, int]:
        """The shard with its place in the output, and the index of its first row; rows: how many
        were read before it."""

    @abstractmethod
    def has(self, shard: Shard) -> bool:
        """Whether it is there already; asked for each once, in order."""

    @abstractmethod
    def end(self, plan: Sequence[Slice], names: Sequence[str]) -> dict[str, Any] | None:
        """All put together: the outcome for the manifest. None while shards are missing."""

    @abstractmethod
    def tidy(self, manifest: Mapping[str, Any]) -> None:
        """With the manifest written: remove what only a run that goes on needs."""

    def _write_skipped(
        self,
        plan: Sequence[Slice],
        names: Sequence[str],
        shards: Mapping[Key, Written],
        *,
        is_folder: bool,
    ) -> None:
        """Raises ForgottenError."""
        ledger = self._ledger
        rows = skipped_rows(plan, names, shards, ledger.ends, ledger.refused, is_folder=is_folder)
        with self._parts.replacing(self._job.skipped) as file:
            file.writelines(orjson.dumps(one) + b"\n" for one in rows)

    def _none_skipped(self) -> None:
        self._job.skipped.unlink(missing_ok=True)


class FolderOutput(Output):
    """Shards stay as they are. Several writers may share it."""

    def read(self, run: str, manifest: Mapping[str, Any]) -> None:
        shards, ends = noted_by(manifest)
        self._ledger.shards |= shards
        self._ledger.ends |= ends
        super().read(run, manifest)

    def placed(self, which: Slice, shard: Shard, rows: int) -> tuple[Shard, int]:
        return shard, which.first_index + shard.first

    def has(self, shard: Shard) -> bool:
        return self._ledger.has(shard)

    def end(self, plan: Sequence[Slice], names: Sequence[str]) -> dict[str, Any] | None:
        self._ledger.read()
        shards = self._ledger.shards
        found = outcome(plan, len(names), shards, self._ledger.ends, path_of=self._names())
        if found is None:
            return None
        for file in found["files"]:
            with suppress(OSError):
                if (self._parts.folder / file["name"]).stat().st_size == file["size"]:
                    continue
            return None
        return found if self._end_skipped(found, plan, names) else None

    def _end_skipped(
        self, found: Mapping[str, Any], plan: Sequence[Slice], names: Sequence[str]
    ) -> bool:
        """False where another part has put all together meanwhile, or begins its ledger anew."""
        if not found["skipped"]:
            self._none_skipped()
            self._parts.ledger_of_refused.unlink(missing_ok=True)
            return True
        ledger = self._ledger
        try:
            self._write_skipped(plan, names, ledger.shards, is_folder=True)
            ledger.keep(
                (one.number, number)
                for one in plan
                for number in range(ledger.ends[one.number].shards)
            )
        except ForgottenError:
            return False
        return True

    def tidy(self, manifest: Mapping[str, Any]) -> None:
        kept = [file["name"] for file in manifest["files"]]
        if manifest["skipped"]:
            kept.append(self._parts.ledger_of_refused.name)
        self._parts.finish(kept)

    def _names(self) -> dict[Key, str]:
        return {key: self._parts.path(key).name for key in self._ledger.shards}


class FileOutput(Output):
    """One file, in the order of the rows."""

    def __init__(self, job: Job, parts: Parts) -> None:
        super().__init__(job, parts)
        self._joined: Joined | None = None
        self._waiting: deque[Key] = deque()
        self._there: set[Key] = set()
        self._count = 0  # of shards that were asked for

    def read(self, run: str, manifest: Mapping[str, Any]) -> None:
        super().read(run, manifest)
        self._joined = Joined(self._parts, self._job.format, run)
        self._joined.read(self._job.target, self._ledger.tells_refused)

    def open(self, run: str) -> None:
        super().open(run)
        if self._joined is None:
            self._joined = Joined(self._parts, self._job.format, run)
        self._joined.open()
        self._join()

    def placed(self, which: Slice, shard: Shard, rows: int) -> tuple[Shard, int]:
        return replace(shard, first=rows), rows

    def has(self, shard: Shard) -> bool:
        place, self._count = self._count, self._count + 1
        if self._joined is not None and self._joined.has(shard, place):
            return True
        self._waiting.append(shard.key)
        if self._ledger.has(shard):
            self._there.add(shard.key)
            self._join()
            return True
        return False

    def take(self, written: Written) -> None:
        super().take(written)
        self._there.add(written.key)
        self._join()

    def _join(self) -> None:
        while self._is_open and self._waiting and self._waiting[0] in self._there:
            key = self._waiting.popleft()
            self._there.discard(key)
            assert self._joined is not None
            self._joined.add(self._ledger.shards[key])

    def end(self, plan: Sequence[Slice], names: Sequence[str]) -> dict[str, Any] | None:
        assert self._joined is not None
        assert not self._waiting, self._waiting
        self._joined.cut(self._count)  # of an input that was longer
        proof = self._joined.finish(self._job.target)
        shards = {one.key: one for one in self._joined.shards}
        found = outcome(plan, len(names), shards, self._ledger.ends, path_of=None)
        assert found is not None
        if found["skipped"]:
            self._write_skipped(plan, names, shards, is_folder=False)
        else:
            self._none_skipped()
        proof = replace(proof, made_of=made_of(one.made_of for one in self._joined.shards))
        files = [{"name": printable(self._job.target.name), **asdict(proof)}]
        return {**found, "files": files}

    def tidy(self, manifest: Mapping[str, Any]) -> None:
        self._parts.clear()
