"""`nv-embed encode`: a file of texts to files of vectors, without a server, resumable.

The rows are embedded a shard at a time; a shard is written whole or not at all, so that being
killed costs the shard in hand. A manifest beside the output says what it was made of; `--resume`
goes on only with the same. Constant memory: a shard's worth.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeVar

import orjson
from tqdm import tqdm

from model.errors import InputError, NonFiniteError
from model.fingerprint import fingerprint
from model.hub import ModelSource
from model.tokenizer import Truncation
from server.text_files import InputFileError, sha256_of
from server.vector_files import FORMATS, VectorFormat, replacing

if TYPE_CHECKING:
    from model.encoder import Encoder


Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


class WriteShard(Protocol[Row_contra]):
    def __call__(self, file: BinaryIO, rows: Sequence[Row_contra], first: int, /) -> None: ...


class ResumeError(Exception):
    """The output there was not made of the same things, or must not be overwritten."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is embedded, how, and where to. `target` is a file, or a folder for shards."""

    source: Path
    target: Path
    field: str
    prefix: str
    truncate: Truncation
    shard_size: int
    format: VectorFormat

    @property
    def parts(self) -> Path:
        """The folder of the shards."""
        return self.target if self.is_folder else self.target.with_name(self.target.name + ".parts")

    @property
    def is_folder(self) -> bool:
        return self.target.suffix not in FORMATS

    @property
    def manifest(self) -> Path:
        if self.is_folder:
            return self.target / "manifest.json"
        return self.target.with_name(self.target.name + ".manifest.json")

    def shard(self, number: int) -> Path:
        return self.parts / f"part-{number:05}{self.format.suffix}"


def describe(
    job: Job, model: ModelSource, how: dict[str, Any], rows_of_input: Iterator[Any]
) -> dict[str, Any]:
    """The manifest of a job: everything that its vectors depend on. Reads the whole input once,
    so a bad row is found before a model is loaded. Raises InputFileError."""
    rows = sum(1 for _ in rows_of_input)
    if not rows:
        raise InputFileError(f"{job.source} holds no text")
    return {
        "input": {"sha256": sha256_of(job.source), "rows": rows, "field": job.field},
        "model": {
            "id": model.model_id,
            "revision": model.revision,
            "fingerprint": fingerprint(model.path),
            **how,
        },
        "prefix": job.prefix,
        "truncate": str(job.truncate),
        "format": job.format.suffix,
        "shard_size": job.shard_size,
        "shards": -(-rows // job.shard_size),
    }


def prepare(job: Job, manifest: dict[str, Any], *, resume: bool) -> bool:
    """Make the output's place ready; False when all is done already. Raises ResumeError."""
    earlier = _read_manifest(job.manifest)
    if not resume:
        if earlier is not None and not earlier.get("complete"):
            raise ResumeError(
                f"{job.manifest} is of an unfinished run: go on with --resume, or remove it"
            )
        if job.is_folder and job.target.exists() and any(job.target.iterdir()):
            raise ResumeError(f"{job.target} is not empty: take another folder, or --resume")
        shutil.rmtree(job.parts, ignore_errors=True)
    elif earlier is not None:
        complete = earlier.pop("complete", False)
        changed = [name for name in manifest if manifest[name] != earlier.get(name)]
        if changed:
            raise ResumeError(
                f"{job.manifest} was made with another {', '.join(changed)}: the vectors would "
                "not belong together"
            )
        if complete:
            return False
    job.parts.mkdir(parents=True, exist_ok=True)
    _write_manifest(job.manifest, manifest)
    return True


def run(job: Job, manifest: dict[str, Any], rows: Iterator[Row], write: WriteShard[Row]) -> None:
    """Write what is missing of the shards, then put them together.

    rows: of the input, from its beginning; write: makes a shard of some of them.
    """
    count, shards = manifest["input"]["rows"], manifest["shards"]
    with tqdm(total=count, desc="Embedding", unit=" rows", disable=None) as bar:
        for number in range(shards):
            chunk = list(islice(rows, job.shard_size))
            if not job.shard(number).exists():
                with replacing(job.shard(number)) as file:
                    write(file, chunk, number * job.shard_size)
            bar.update(len(chunk))
    if not job.is_folder:
        with replacing(job.target) as file:
            job.format.join(file, [job.shard(number) for number in range(shards)], count)
    _write_manifest(job.manifest, {**manifest, "complete": True})
    if not job.is_folder:
        shutil.rmtree(job.parts)


def text_shards(job: Job, encoder: Encoder) -> WriteShard[str]:
    """Makes shards of texts. It raises InputFileError for a text that cannot be embedded."""

    def write(file: BinaryIO, texts: Sequence[str], first: int) -> None:
        try:
            vectors = encoder.encode(texts, job.prefix, truncate=job.truncate, progress=False)
        except (InputError, NonFiniteError) as error:
            index = error.rows[0] if isinstance(error, NonFiniteError) else error.index or 0
            raise InputFileError(f"{job.source}, line {first + index + 1}: {error}") from None
        job.format.write(file, vectors, first)

    return write


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        raw = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise ResumeError(f"{path} is not a manifest") from None
    return dict(raw)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")
