"""`nv-embed encode`: files of texts to files of vectors, without a server, resumable.

Owns the order of a run: inputs are cut into slices before they are read, each slice is read once,
a shard at a time, and what is there already is skipped. A manifest beside the output says what it
was made of; `--resume` and `--part` go on only with the same. A shard is written whole; what is
done of the one in hand is kept every half a minute. Constant memory: a shard's worth. Knows neither
how rows are read nor how vectors are written.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from typing import Any, Generic, NamedTuple, NoReturn

import orjson

from model.batch import RunnerInfo
from model.errors import UnsupportedError
from model.fingerprint import fingerprint
from model.hub import ModelSource
from model.progress import Progress
from model.prompts import Parts, Prompt, written
from model.user_files import LockedError, locked
from server.offline.crew import Crew, Task
from server.offline.job import Job, Row, Rows
from server.offline.manifest import (
    LAYOUT,
    Settled,
    description_of,
    differences,
    made_of,
    printable,
    read_manifest,
    run_of,
    settled_by,
)
from server.offline.output import FileOutput, FolderOutput, Output
from server.offline.parts import OutputError, Proof, SliceEnd
from server.offline.shards import Chunk, Reading, chunks_of
from server.offline.slices import Slice, plan
from server.offline.sources import Source
from server.offline.text_files import InputFileError

logger = logging.getLogger("nv_embed.encode")

KEEP_EVERY_S = 30.0
"""How much work of an unfinished shard is lost at most, and a batch."""
_SETTLED = ("model.dtype", "model.products")
"""What `auto` finds by timing."""


class OtherSettledError(Exception):
    """A part that began at the same time has found other values for `auto`: take those."""


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
            stack.enter_context(locked(lock, job.target, shared=job.is_part))
            if job.is_part:
                own = job.target / f".part-{job.part.tag}.lock"
                stack.enter_context(locked(own, job.target))
            yield
    except LockedError as error:
        raise OutputError(str(error)) from None
    finally:
        if made:
            with suppress(OSError):  # it holds something now, or is gone
                job.target.rmdir()


def _digest(examples: Parts) -> str | None:
    """SHA-256: they may be private, as the input is, and are too long to be shown."""
    return hashlib.sha256(orjson.dumps(examples)).hexdigest() if examples else None


class Tally(NamedTuple):
    """What a run came to. is_complete: all parts of it are there."""

    rows: int
    skipped: int
    is_complete: bool


class Run(Generic[Row]):
    """One job on its inputs: `describe`, `is_done`, `begin`, `finish`, in this order."""

    def __init__(self, job: Job, sources: Sequence[Source], rows: Rows[Row], mode: int) -> None:
        self._job, self._sources, self._rows = job, sources, rows
        self._parts = job.parts(mode)
        self._output: Output = (FolderOutput if job.is_folder else FileOutput)(job, self._parts)
        self._plan: list[Slice] = []
        self._manifest: dict[str, Any] = {}
        self._earlier: dict[str, Any] | None = None
        self._has_begun = self._is_complete = False
        self._ahead: list[Task[Row]] = []  # read before the model was loaded
        self._pending = self._missing()
        self._read = self._done = self._kept = 0  # rows
        self._reading = Reading()
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
        return run_of(self._manifest)

    def describe(
        self,
        model: ModelSource,
        prompt: Prompt,
        asked: Mapping[str, str],
        defaults: Mapping[str, Any],
    ) -> None:
        """Plan the run. prompt: around each text. asked: how the model shall run; "auto" is
        settled by `begin`. defaults: what else the vectors depend on. Raises InputFileError."""
        job = self._job
        self._plan = plan(self._sources, job.shard_size)
        files = [
            {"name": printable(one.name), "bytes": one.size, "kind": str(one.kind)}
            for one in self._sources
        ]
        self._manifest = {
            "layout": LAYOUT,
            "input": {"files": files, "field": job.field, "columns": job.columns.described},
            "model": {
                "id": printable(model.model_id),
                "revision": model.revision,
                "family": model.family,
                "fingerprint": fingerprint(model.path),
                **{name: value for name, value in asked.items() if value != "auto"},
            },
            "prefix": written(prompt.prefix),
            "suffix": written(prompt.suffix),
            "examples": _digest(prompt.examples),
            "truncate": str(job.truncate),
            "on_error": "skip" if job.skip else "fail",
            "format": job.format.suffix,
            "output_dtype": job.format.dtype,
            "compression": job.format.compression,
            "shard_size": job.shard_size,
            **defaults,
        }

    # What is there

    def is_done(self, *, resume: bool) -> bool:
        """Whether an earlier run did it all; else the first rows were read, and can be embedded.

        Raises OutputError when this one must not begin, InputFileError for a bad row.
        """
        job = self._job
        taken = job.is_folder and any(
            entry != job.manifest and not entry.name.startswith(".")
            for entry in job.target.iterdir()
        )
        self._earlier = read_manifest(job.manifest)
        complete = bool(self._earlier and self._earlier.get("complete"))
        if not (complete or job.is_part) and self._parts.is_empty:
            self._earlier = None  # a run that had done nothing yet binds nobody
        if self._earlier is None or not (resume or job.is_part):
            self._refuse_taken(taken, complete, resume)
            self._earlier = None
        else:
            self._refuse_another()
            self._manifest |= description_of(self._earlier)
            self._output.read(run_of(self._earlier), self._earlier)
            if complete and not job.is_folder and self._is_whole():
                return True
        self._ahead = list(islice(self._pending, 1))
        return not self._ahead and self._is_ended(complete)

    def _refuse_taken(self, taken: bool, complete: bool, resume: bool) -> None:
        job = self._job
        if not resume and self._earlier is not None and not complete:
            raise OutputError(
                f"{job.manifest} is of an unfinished run: go on with --resume, or remove "
                f"{job.to_remove}"
            )
        if taken:
            hint = ", or --resume" if self._earlier is not None else ""
            raise OutputError(f"{job.target} is not empty: take another folder{hint}")

    def _is_ended(self, complete: bool) -> bool:
        """With nothing left to be embedded by this run."""
        if not self._read and not self._job.is_part:
            names = ", ".join(source.name for source in self._sources[:3])
            raise InputFileError(f"{names} holds no text")
        if self._earlier is None:  # a part without rows, and the first: there is no manifest
            return not self._mine()
        if complete:
            self._manifest, self._is_complete = dict(self._earlier), True
            return True
        self._parts.make()
        self._output.open(self.run)
        self._end()
        return True

    def _is_whole(self) -> bool:
        """Whether the one file of a complete run is still what it wrote, of this input."""
        assert self._earlier is not None
        job = self._job
        digests = (c.shard.digest for c in self._chunks() if not isinstance(c, SliceEnd))
        now = made_of(digests)
        with suppress(KeyError, TypeError, IndexError):
            file = self._earlier["files"][0]
            if file["made_of"] != now:
                raise OutputError(self._another(["input.texts"]))
            if not job.target.exists():
                logger.warning(
                    "%s was complete and is gone; to make it anew, remove %s",
                    job.target,
                    job.to_remove,
                )
                self._manifest = dict(self._earlier)
                return True
            if Proof(file["size"], file["sha256"]).holds(job.target):
                self._manifest = dict(self._earlier)
                return True
        logger.warning("%s is not what its run wrote: it is made anew", job.target)
        return False

    @property
    def settled(self) -> Settled:
        """With `is_done` asked: what was chosen by timing when the earlier run began. To choose
        anew could mean other numbers, and their vectors have to go with those that are kept."""
        return settled_by(self._earlier or {})

    def refuse_settled(self, error: UnsupportedError) -> NoReturn:
        """Raises `error`, or OutputError where it is the earlier run that asks for too much."""
        if self._earlier is None:
            raise error
        raise OutputError(
            f"{self._job.manifest} cannot be gone on with here: {error}; use the machine that it "
            f"was begun on, or remove {self._job.to_remove} to begin anew"
        ) from None

    def _refuse_another(self) -> None:
        """Raises OutputError naming what differs from the earlier run's manifest."""
        assert self._earlier is not None
        if self._earlier.get("layout") != LAYOUT:
            raise OutputError(
                f"{self._job.manifest} is of an earlier version of this program, which cut shards "
                f"otherwise: finish it with that, or remove {self._job.to_remove} to begin anew"
            )
        if changed := differences(self._manifest, self._earlier):
            raise OutputError(self._another(changed))

    def _another(self, changed: Sequence[str]) -> str:
        return (
            f"{self._job.manifest} was made with another {', '.join(changed)}: the vectors would "
            f"not belong together; give the same, or remove {self._job.to_remove} to begin anew"
        )

    # The work

    def begin(self, info: RunnerInfo, vectors: str) -> None:
        """With the model ready, and how it runs settled: the first thing that is written.

        vectors: their fingerprint. Raises OutputError for a mix, OtherSettledError.
        """
        self._manifest["model"] = {
            **self._manifest["model"],
            "dtype": info.dtype,
            "quantization": info.quantization,
            "attention": info.attention,
            "fused_kernels": info.fused_kernels,
            "products": info.products,
            "device": info.device.partition(":")[0],
        }
        self._manifest["vectors"] = vectors
        if self._earlier is not None:
            self._refuse_another()
        with self._leaving_nothing():
            if self._earlier is None and not self._job.is_part:
                self._parts.clear()
            self._parts.make()
            self._parts.sweep()
            self._write_first()
            self._has_begun = True
            self._output.open(self.run)

    def _write_first(self) -> None:
        """The manifest of a run that has begun, once, by whichever part is the first."""
        if self._earlier is not None and not self._earlier.get("complete"):
            return
        try:
            self._write_manifest(self._manifest, new=self._job.is_part and self._earlier is None)
        except FileExistsError:
            self._earlier = read_manifest(self._job.manifest)
            changed = differences(self._manifest, self._earlier or {})
            if changed and all(one.startswith(_SETTLED) for one in changed):
                raise OtherSettledError from None
            self._refuse_another()
            self._manifest = description_of(self._earlier or {})

    def finish(self, crew: Crew[Row]) -> None:
        """Write what is missing of the shards, then put them together. Raises InputFileError for a
        row that cannot be embedded."""
        self._crew = crew
        with self._leaving_nothing(), Progress(self._total()) as self._progress:
            for shard in crew.write(self._todo(), self._advance):
                self._output.take(shard)
                self._kept += shard.rows
            self._end()

    def _end(self) -> None:
        names = [source.name for source in self._sources]
        found = self._output.end(self._plan, names)
        if found is not None:
            self._manifest = {**description_of(self._manifest), **found, "complete": True}
            self._write_manifest(self._manifest)
            self._is_complete = True
            self._output.tidy(self._manifest)
        elif (now := read_manifest(self._job.manifest)) and now.get("complete"):
            self._manifest, self._is_complete = now, True  # another part was quicker

    def _todo(self) -> Iterator[Task[Row]]:
        while self._ahead:
            yield self._ahead.pop()
        yield from self._pending

    def _missing(self) -> Iterator[Task[Row]]:
        """The shards that are not there, each with the index of its first row."""
        for one in self._chunks():
            if isinstance(one, SliceEnd):
                self._output.slice_ended(one)
                continue
            which = self._plan[one.shard.slice]
            shard, index = self._output.placed(which, one.shard, self._read)
            self._read += shard.rows
            if self._progress is not None:
                self._progress.expect(self._total())
            if self._output.has(shard):
                self._kept += shard.rows
                self._done += shard.rows
                if self._progress is not None:
                    self._progress.skip_to(self._done)
            else:
                yield Task(one._replace(shard=shard), index)

    def _chunks(self) -> Iterator[Chunk[Row] | SliceEnd]:
        job = self._job
        for which in self._mine():
            self._reading = Reading(which.number)
            yield from chunks_of(
                which,
                self._sources,
                self._rows,
                job.shard_size,
                skip=job.skip,
                reading=self._reading,
            )

    def _mine(self) -> list[Slice]:
        return [one for one in self._plan if self._job.part.has(one.number)]

    def _total(self) -> int | None:
        """How many rows this run has, as far as those that were read tell; None of a stream."""
        mine = self._mine()
        size = sum(one.size for one in mine)
        read = sum(one.size for one in mine if one.number < self._reading.slice)
        read += int(self._plan[self._reading.slice].size * self._reading.share) if mine else 0
        return round(self._read * size / read) if read else None

    def _advance(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress.reach(self._done)

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

    def _write_manifest(self, document: Mapping[str, Any], *, new: bool = False) -> None:
        with self._parts.replacing(self._job.manifest, new=new) as file:
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
