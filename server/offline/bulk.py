"""`nv-embed encode`: files of texts to files of vectors, without a server, resumable.

Owns the order of a run: inputs are cut into slices before they are read, each slice is read once,
a shard at a time, and what is there already is skipped. A manifest beside the output says what it
was made of; `--resume` and `--part` go on only with the same. A shard is written whole; what is
done of the one in hand is kept every half a minute. Constant memory: a shard's worth. Knows neither
how rows are read nor how vectors are written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any, Generic, NamedTuple

from model.batch import RunnerInfo
from model.hub import ModelSource
from model.progress import Progress
from model.prompts import Prompt
from model.user_files import LockedError, locked
from server.offline.crew import Crew, Task
from server.offline.earlier import Earlier, OtherSettledError
from server.offline.job import Job, Row, Rows
from server.offline.ledger import Ledger
from server.offline.manifest import (
    as_json,
    description,
    description_of,
    made_of,
    read_manifest,
    resolved,
    run_of,
)
from server.offline.output import FileOutput, FolderOutput, Output
from server.offline.parts import OutputError, Proof, SliceEnd, Written
from server.offline.places import InputFileError
from server.offline.reader import Input, Reader
from server.offline.slices import Slice
from server.offline.sources import Source

logger = logging.getLogger("nv_embed.encode")

KEEP_EVERY_S = 30.0
"""How much work of an unfinished shard is lost at most, and a batch."""
_WAITS_S = (0.01, 0.03, 0.1, 0.3)
"""Between the tries to take a lock that others hold for a moment."""

__all__ = ["OtherSettledError", "Run", "Tally", "WriteSlices", "place"]


@contextmanager
def place(job: Job) -> Iterator[None]:
    """The output's place, for this run alone, or for the parts of one. Nothing is left of a run
    that did not begin."""
    made = False
    if job.is_folder and not job.target.is_dir():
        with suppress(FileExistsError):  # another run was quicker
            job.target.mkdir()
            made = True
    lock = job.manifest.with_name(f".{job.manifest.name}.lock")
    try:
        with ExitStack() as stack:
            if job.is_part:
                _patiently(stack, lambda: locked(lock, job.target, shared=True))
                own = job.parts(0).lock_of(job.part.tag)
                _patiently(stack, lambda: locked(own, job.target))
            else:
                stack.enter_context(locked(lock, job.target))
            yield
    except LockedError as error:
        raise OutputError(str(error)) from None
    finally:
        if made:
            with suppress(OSError):  # it holds something now, or is gone
                job.target.rmdir()


def _patiently(stack: ExitStack, lock: Callable[[], AbstractContextManager[None]]) -> None:
    """Take it, though another part holds it for a moment: to see whether it is the last one, or
    whether somebody lives. Raises LockedError when it is held for longer."""
    for wait in _WAITS_S:
        try:
            stack.enter_context(lock())
            return
        except LockedError:
            time.sleep(wait)
    stack.enter_context(lock())


WriteSlices = Callable[[Sequence[Slice], Sequence[Input], Ledger], Iterable[Written | SliceEnd]]


class Tally(NamedTuple):
    """What a run came to. is_complete: all parts of it are there."""

    rows: int
    skipped: int
    is_complete: bool


class Run(Generic[Row]):
    """One job on its inputs: `describe`, `is_done`, `begin`, `finish`, in this order."""

    def __init__(self, job: Job, sources: Sequence[Source], rows: Rows[Row], mode: int) -> None:
        """Raises InputFileError for an input that cannot be cut."""
        self._job, self._sources = job, sources
        self._reader = Reader(job, sources, rows)
        self._parts = job.parts(mode)
        self._output: Output = (FolderOutput if job.is_folder else FileOutput)(job, self._parts)
        self._manifest: dict[str, Any] = {}
        self._earlier = Earlier(job)
        self._has_begun = self._is_complete = False
        self._missing = self._missing_shards()
        self._ahead: list[Task[Row]] = []  # read before the model was loaded
        self._read = self._done = self._kept = 0  # rows
        self._crew: Crew[Row] | None = None
        self._progress: Progress | None = None

    @property
    def tally(self) -> Tally:
        rows = self._manifest.get("rows", self._read)
        return Tally(rows, self._manifest.get("skipped", 0), self._is_complete)

    @property
    def rows_kept(self) -> int:
        return self._kept + (self._crew.rows_kept if self._crew is not None else 0)

    @property
    def run(self) -> str:
        """A name for all that the vectors depend on."""
        return run_of(self._manifest)

    @property
    def earlier(self) -> Earlier:
        """With `is_done` asked: what an earlier run has settled."""
        return self._earlier

    def describe(
        self,
        model: ModelSource,
        prompt: Prompt,
        asked: Mapping[str, str],
        defaults: Mapping[str, Any],
    ) -> None:
        """What the run will be made of (server/offline/manifest.py)."""
        self._manifest = description(self._job, self._sources, model, prompt, asked, defaults)

    # What is there

    def is_done(self, *, resume: bool) -> bool:
        """Whether an earlier run did it all; else the first rows were read, and can be embedded.

        Raises OutputError when this one must not begin, InputFileError for a bad row.
        """
        earlier = self._earlier
        earlier.read(self._manifest, resume=resume, is_empty=self._parts.is_empty)
        if earlier.manifest is not None:
            self._manifest |= description_of(earlier.manifest)
            self._output.read(self.run, earlier.manifest)
            if earlier.is_complete and not self._job.is_folder and self._is_whole():
                return True
        self._ahead = list(islice(self._missing, 1))
        return not self._ahead and self._is_ended()

    def _is_ended(self) -> bool:
        """With nothing left to be embedded by this run."""
        if not self._read and not self._job.is_part:
            raise InputFileError(f"{', '.join(self._reader.names[:3])} holds no text")
        if self._earlier.manifest is None:  # a part without rows, and the first
            return not self._reader.mine
        if self._earlier.is_complete:
            self._manifest, self._is_complete = self._earlier.manifest, True
            if self._job.is_folder:
                self._output.tidy(self._manifest)  # of those that were killed
            return True
        self._parts.make()
        self._output.open(self.run)
        self._end()
        return True

    def _is_whole(self) -> bool:
        """Whether the one file of a complete run is still what it wrote, of this input."""
        earlier, target = self._earlier.manifest, self._job.target
        assert earlier is not None
        chunks = self._reader.chunks()
        now = made_of(one.shard.digest for one in chunks if not isinstance(one, SliceEnd))
        with suppress(KeyError, TypeError, IndexError):
            file = earlier["files"][0]
            if file["made_of"] != now:
                raise self._earlier.another(["input.texts"])
            if not target.exists():
                gone = "%s was complete and is gone; to make it anew, remove %s"
                logger.warning(gone, target, self._job.to_remove)
            elif not Proof(file["size"], file["sha256"]).holds(target):
                logger.warning("%s is not what its run wrote: it is made anew", target)
                return False
            self._manifest = earlier
            return True
        return False

    def _missing_shards(self) -> Iterator[Task[Row]]:
        """The shards that are not there, each with the index of its first row."""
        for one in self._reader.chunks():
            if isinstance(one, SliceEnd):
                self._output.slice_ended(one)
                continue
            which = self._reader.plan[one.shard.slice]
            shard, index = self._output.placed(which, one.shard, self._read)
            self._read += shard.rows
            if self._progress is not None:
                self._progress.expect(self._reader.total(self._read))
            if self._output.has(shard):
                self._kept += shard.rows
                self._done += shard.rows
                if self._progress is not None:
                    self._progress.skip_to(self._done)
            else:
                yield Task(one._replace(shard=shard), index)

    # The work

    def begin(self, info: RunnerInfo, vectors: str) -> None:
        """With the model ready, and how it runs settled: the first thing that is written.

        vectors: their fingerprint. Raises OutputError for a mix, OtherSettledError.
        """
        self._manifest = resolved(self._manifest, info, vectors)
        self._earlier.refuse_another(self._manifest)
        with self._leaving_nothing():
            if self._earlier.manifest is None and not self._job.is_part:
                self._parts.clear()
            self._parts.make()
            self._parts.sweep()
            self._write_first()
            self._has_begun = True
            self._output.open(self.run)

    def _write_first(self) -> None:
        """The manifest of a run that has begun, once, by whichever part is the first."""
        earlier = self._earlier
        if earlier.manifest is not None and not earlier.is_complete:
            return
        try:
            self._write_manifest(new=self._job.is_part and earlier.manifest is None)
        except FileExistsError:
            earlier.take_another(self._manifest)
            self._manifest = description_of(earlier.manifest or {})

    def finish(self, crew: Crew[Row]) -> None:
        """Write what is missing of the shards, then put them together. Raises InputFileError for a
        row that cannot be embedded."""
        self._crew = crew
        total = self._reader.total(self._read)
        with self._leaving_nothing(), Progress(total) as self._progress:
            self._progress.skip_to(self._done)
            for shard in crew.write(self._todo(), self._advance):
                self._output.take(shard)
                self._kept += shard.rows
            self._end()

    def finish_slices(self, write: WriteSlices) -> None:
        """The same where others read the slices, too (ShardWriter.write_slice): a folder's.

        write: the shards of each slice of these inputs, but those that the ledger has, then how
        the slice ended; of any slice at any time.
        """
        assert self._job.is_folder
        with self._leaving_nothing(), Progress(None) as self._progress:
            for one in write(self._reader.mine, self._reader.inputs, self._output.ledger):
                if isinstance(one, SliceEnd):
                    self._output.slice_ended(one)
                else:
                    self._output.take(one)
                    self._kept += one.rows
                    self._advance(one.rows)
            self._parts.sweep()  # of those that were killed
            self._end()

    def _todo(self) -> Iterator[Task[Row]]:
        while self._ahead:
            yield self._ahead.pop()
        yield from self._missing

    def _advance(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress.reach(self._done)

    def _end(self) -> None:
        found = self._output.end(self._reader.plan, self._reader.names)
        if found is not None:
            self._manifest = {**description_of(self._manifest), **found, "complete": True}
            self._write_manifest()
            self._is_complete = True
            self._output.tidy(self._manifest)
        elif (now := read_manifest(self._job.manifest)) and now.get("complete"):
            self._manifest, self._is_complete = now, True  # another part was quicker
            self._output.tidy(now)
        elif not self._job.is_part:
            raise OutputError(
                f"{self._job.target}: what this run had written went away or changed; the same "
                "command with --resume goes on"
            )

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """A run that fails before anything was kept leaves nothing that a later one trips over.
        A part leaves what others may have joined."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if self._parts.is_empty and not self._is_complete and not self._job.is_part:
                    if self._has_begun:  # otherwise the manifest is that of an earlier run
                        self._job.manifest.unlink(missing_ok=True)
                    self._parts.clear()
            raise

    def _write_manifest(self, *, new: bool = False) -> None:
        with self._parts.replacing(self._job.manifest, new=new) as file:
            file.write(as_json(self._manifest))
