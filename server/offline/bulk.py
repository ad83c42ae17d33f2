"""`nv-embed encode`: a file of texts to files of vectors, without a server, resumable.

Owns the order of a run: the input is read once to describe it, then again, a shard at a time, and
what is read must be the same. A manifest beside the output says what it was made of; `--resume`
goes on only with the same. A shard is written whole; what is done of the one in hand is kept every
half a minute. Constant memory: a shard's worth. Knows neither how rows are read nor how vectors
are written.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, NoReturn

import numpy as np
import orjson

from model.batch import RunnerInfo
from model.errors import UnsupportedError
from model.fingerprint import fingerprint
from model.hub import ModelSource
from model.progress import Progress
from model.prompts import Parts, Prompt, written
from model.user_files import LockedError, locked
from server.offline.job import Job, Row, Rows, Tokenize
from server.offline.manifest import (
    Settled,
    differences,
    printable,
    proofs_of,
    read_manifest,
    settled_by,
)
from server.offline.parts import Ledger, OutputError, Proof, Shard, proves
from server.offline.shards import shards_of
from server.offline.sources import Source
from server.offline.text_files import InputFileError

if TYPE_CHECKING:
    from model.encoder import Encoder

logger = logging.getLogger("nv_embed.encode")

KEEP_EVERY_S = 30.0
"""How much work of an unfinished shard is lost at most, and a batch."""


@contextmanager
def place(job: Job) -> Iterator[None]:
    """The output's place, for this run alone. Nothing is left of a run that did not begin."""
    made = False
    if job.is_folder and not job.target.is_dir():
        with suppress(FileExistsError):  # another run was quicker
            job.target.mkdir()
            made = True
    lock = job.manifest.with_name(f".{job.manifest.name}.lock")
    try:
        with locked(lock, job.target):
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


class Run(Generic[Row]):
    """One job on one input: `describe`, `is_done`, `begin`, `finish`, in this order."""

    def __init__(self, job: Job, source: Source, rows: Rows[Row], mode: int) -> None:
        self._job, self._source, self._rows = job, source, rows
        self._parts = job.parts(mode)
        self._manifest: dict[str, Any] = {}
        self._shards: list[Shard] = []
        self._earlier: dict[str, Any] | None = None
        self._proofs: dict[int, Proof] = {}
        self._has_begun = self._is_complete = False
        self.rows_kept = 0

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self._shards)

    def describe(
        self,
        model: ModelSource,
        prompt: Prompt,
        asked: Mapping[str, str],
        defaults: Mapping[str, Any],
    ) -> None:
        """Read the whole input once, so that a bad row is found before a model is loaded.

        prompt: around each text. asked: how the model shall run; "auto" is settled by `begin`.
        defaults: what else the vectors depend on. Raises InputFileError.
        """
        job = self._job
        sha256 = self._source.sha256()
        self._shards = [shard for shard, _ in shards_of(self._rows, job.shard_size)]
        if not self._shards:
            raise InputFileError(f"{self._source.name} holds no text")
        self._manifest = {
            "input": {
                "sha256": sha256,
                "rows": self.num_rows,
                "field": job.field,
                "kind": str(self._source.kind),
            },
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
            "format": job.format.suffix,
            "shard_size": job.shard_size,
            "shards": len(self._shards),
            **defaults,
        }

    def is_done(self, *, resume: bool) -> bool:
        """Whether an earlier run did it all. Raises OutputError when this one must not begin."""
        job = self._job
        self._earlier = read_manifest(job.manifest)
        complete = bool(self._earlier and self._earlier.get("complete"))
        if self._earlier is not None and not complete and self._parts.is_empty:
            self._earlier = None  # a run that had done nothing yet binds nobody
        taken = job.is_folder and any(
            entry != job.manifest and not entry.name.startswith(".")
            for entry in job.target.iterdir()
        )
        if not resume or self._earlier is None:
            if not resume and self._earlier is not None and not complete:
                raise OutputError(
                    f"{job.manifest} is of an unfinished run: go on with --resume, or remove "
                    f"{job.to_remove}"
                )
            if taken:
                hint = ", or --resume" if self._earlier is not None else ""
                raise OutputError(f"{job.target} is not empty: take another folder{hint}")
            self._earlier = None
            return False
        self._refuse_another()
        if not complete:
            return False
        return self._is_whole()

    def _is_whole(self) -> bool:
        """Whether the files of a complete run are still what it wrote."""
        assert self._earlier is not None
        job, proofs = self._job, proofs_of(self._earlier)
        if job.is_folder:
            self._proofs = proofs
            paths = {shard: self._parts.path(shard.number) for shard in self._shards}
            return all(proves(proofs.get(s.number), s, path) for s, path in paths.items())
        if not job.target.exists():
            logger.warning(
                "%s was complete and is gone; to make it anew, remove %s", job.target, job.to_remove
            )
        elif not proofs or not proofs[0].holds(job.target):
            logger.warning("%s is not what its run wrote: it is made anew", job.target)
            return False
        return True

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

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """A run that fails before anything was kept leaves nothing that a later one trips over."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if self._parts.is_empty and not self._is_complete:
                    if self._has_begun:  # otherwise the manifest is that of an earlier run
                        self._job.manifest.unlink(missing_ok=True)
                    self._parts.clear()
            raise

    def begin(self, info: RunnerInfo, vectors: str) -> None:
        """With the model ready, and how it runs settled: the first thing that is written.

        vectors: their fingerprint.
        """
        self._vectors = vectors
        self._manifest["model"] |= {
            "dtype": info.dtype,
            "quantization": info.quantization,
            "attention": info.attention,
            "fused_kernels": info.fused_kernels,
            "products": info.products,
            "device": info.device.partition(":")[0],
        }
        if self._earlier is not None:
            self._refuse_another()
        with self._leaving_nothing():
            if self._earlier is None:
                self._parts.clear()
            self._parts.make()
            self._parts.sweep()
            self._write_manifest({})
            self._has_begun = True

    def finish(self, encoder: Encoder, tokenize: Tokenize[Row], *, every: float) -> None:
        """Write what is missing of the shards, then put them together.

        every: seconds after which finished batches of a shard are kept. Raises InputFileError for
        a row that cannot be embedded, or when the input is not what it was.
        """
        with self._leaving_nothing():
            self._finish(encoder, tokenize, every)

    def _finish(self, encoder: Encoder, tokenize: Tokenize[Row], every: float) -> None:
        job, parts = self._job, self._parts
        ledger = Ledger(parts, self._proofs)
        with Progress(self.num_rows) as progress:
            again = shards_of(self._rows, job.shard_size)
            for shard in self._shards:
                found, chunk = next(again, (None, []))
                if found != shard:
                    raise self._changed()
                end = shard.first + shard.rows
                if ledger.has(shard, parts.path(shard.number)):
                    progress.skip_to(end)
                else:
                    self._write_shard(shard, chunk, ledger, encoder, tokenize, progress, every)
                    progress.reach(end)
                self.rows_kept = end
        sha256 = self._manifest["input"]["sha256"]
        if next(again, None) is not None or self._source.sha256() != sha256:
            raise self._changed()
        if job.is_folder:
            self._complete(self._files(ledger))
            parts.sweep(finished=True)
            return
        with parts.replacing(job.target) as file:
            paths = [parts.path(shard.number) for shard in self._shards]
            job.format.join(file, paths, self.num_rows)
            proof = Proof.of(file)
        files = [{"name": printable(job.target.name), **asdict(proof)}]
        self._complete(files)
        parts.clear()

    def _write_shard(
        self,
        shard: Shard,
        chunk: Sequence[Row],
        ledger: Ledger,
        encoder: Encoder,
        tokenize: Tokenize[Row],
        progress: Progress,
        every: float,
    ) -> None:
        work = tokenize(chunk, shard.first)
        width = encoder.runner.info.width
        vectors = np.empty((len(work.encodings), width), dtype=np.float32)
        lengths = np.array([len(encoding) for encoding in work.encodings], dtype=np.int64)
        todo = max(int(lengths.sum()), 1)

        keeper = self._parts.keeper(shard, width, every)
        done = keeper.recall(vectors)
        tokens = int(lengths[sorted(done)].sum())
        progress.skip_to(shard.first + int(shard.rows * tokens / todo))
        try:
            with keeper:
                for indices, rows, lost in encoder.batches(work.encodings, done):
                    work.check(indices, rows, lost)
                    vectors[indices] = rows
                    if not lost:
                        keeper.add(indices, rows)
                    tokens += int(lengths[[i for i in indices if i not in done]].sum())
                    progress.reach(shard.first + int(shard.rows * tokens / todo))
        finally:
            share = keeper.rows / max(len(vectors), 1)
            self.rows_kept = shard.first + int(shard.rows * min(share, 1))
        with self._parts.replacing(self._parts.path(shard.number)) as file:
            work.write(file, vectors)
            proof = Proof.of(file, shard.digest)
        ledger.note(shard.number, proof)
        keeper.forget()

    def _changed(self) -> InputFileError:
        return InputFileError(
            f"{self._source.name} changed while it was read: nothing was put together; remove "
            f"{self._job.to_remove} and begin anew"
        )

    def _refuse_another(self) -> None:
        """Raises OutputError naming what differs from the earlier run's manifest."""
        assert self._earlier is not None
        changed = differences(self._manifest, self._earlier)
        if changed:
            raise OutputError(
                f"{self._job.manifest} was made with another {', '.join(changed)}: the vectors "
                f"would not belong together; give the same, or remove {self._job.to_remove} to "
                "begin anew"
            )

    def _files(self, ledger: Ledger) -> list[dict[str, Any]]:
        return [
            {
                "name": self._parts.path(shard.number).name,
                "rows": shard.rows,
                **asdict(ledger.proofs[shard.number]),
            }
            for shard in self._shards
        ]

    def _complete(self, files: list[dict[str, Any]]) -> None:
        self._write_manifest({"files": files, "complete": True})
        self._is_complete = True

    def _write_manifest(self, more: Mapping[str, Any]) -> None:
        with self._parts.replacing(self._job.manifest) as file:
            document = {**self._manifest, "vectors": self._vectors, **more}
            file.write(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
