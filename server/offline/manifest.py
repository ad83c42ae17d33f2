"""The manifest beside an output: what a run was made of, and what its files are.

A run goes on with what an earlier one left, and a part joins the others, only if both say the same.
What a run found out at its end (rows, files, what was skipped) is the outcome, the same whoever
writes it. Knows neither how rows are read nor how vectors are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from model.batch import RunnerInfo
from model.errors import FileError
from model.fingerprint import fingerprint
from model.hub import ModelSource
from model.prompts import Parts, Prompt, written
from model.user_files import open_regular
from server.api import vector_format
from server.offline.job import Job
from server.offline.parts import (
    Key,
    OutputError,
    Refusals,
    SliceEnd,
    Written,
    end_of,
    written_of,
)
from server.offline.slices import INDEX_BITS, Slice
from server.offline.sources import Source

LAYOUT = 2
"""How inputs are cut and files named; runs of another layout cannot be gone on with."""
_OUTCOME = ("rows", "skipped", "rows_of_inputs", "slices", "files", "complete")
_TEXTS = ("prefix", "suffix", "examples", "query_instruction")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none. Raises OutputError for what is no manifest."""
    try:
        with open_regular(path) as file:
            raw = orjson.loads(file.read())
    except FileNotFoundError:
        return None
    except (ValueError, FileError):
        raw = None
    if not isinstance(raw, dict):
        raise OutputError(f"{path} is not a manifest: remove it, or name another --output")
    return raw


def description_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What it was made of, without the outcome."""
    return {name: value for name, value in manifest.items() if name not in _OUTCOME}


def run_of(manifest: Mapping[str, Any]) -> str:
    """A name for all that the vectors depend on, but the input's texts."""
    raw = orjson.dumps(_compared(description_of(manifest)), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(raw).hexdigest()


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What of `now` the earlier manifest has otherwise, with both values unless one is text of a
    user's."""
    earlier = _compared(then)
    changed = []
    for name, value in _compared(now).items():
        if earlier.get(name) != value:
            hidden = name.startswith("input.") or name in _TEXTS
            changed.append(name if hidden else f"{name} ({earlier.get(name)} then, {value} now)")
    return changed


def _compared(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names with dots: model.dtype. An input's name is no part of what it is."""
    flat: dict[str, Any] = {}
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    if isinstance(files := flat.get("input.files"), list):
        flat["input.files"] = [
            {key: item for key, item in file.items() if key != "name"}
            for file in files
            if isinstance(file, Mapping)
        ]
    return flat


def description(
    job: Job,
    sources: Sequence[Source],
    model: ModelSource,
    prompt: Prompt,
    asked: Mapping[str, str],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """What is known before the model is loaded. prompt: around each text. asked: how the model
    shall run, but "auto". defaults: what else the vectors depend on."""
    files = [
        {"name": printable(one.name), "bytes": one.size, "kind": str(one.kind)} for one in sources
    ]
    return {
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


def resolved(manifest: Mapping[str, Any], info: RunnerInfo, vectors: str) -> dict[str, Any]:
    """With what the loaded model turned out to be. vectors: their fingerprint."""
    model = {
        **manifest["model"],
        "dtype": info.dtype,
        "quantization": info.quantization,
        "attention": info.attention,
        "fused_kernels": info.fused_kernels,
        "products": info.products,
        "device": info.device.partition(":")[0],
    }
    is_int8 = manifest["output_dtype"] == "int8"
    scale = vector_format.int8_scale(info.width) if is_int8 else None
    return {**manifest, "model": model, "vectors": vectors, "int8_scale": scale}


def as_json(manifest: Mapping[str, Any]) -> bytes:
    """A slice a line: there are many."""
    slices = [orjson.Fragment(orjson.dumps(one)) for one in manifest.get("slices", ())]
    shown = {**manifest, "slices": slices} if slices else manifest
    return orjson.dumps(shown, option=orjson.OPT_INDENT_2) + b"\n"


def _digest(examples: Parts) -> str | None:
    """SHA-256: they may be private, as the input is, and are too long to be shown."""
    return hashlib.sha256(orjson.dumps(examples)).hexdigest() if examples else None


def outcome(
    plan: Sequence[Slice],
    inputs: int,
    shards: Mapping[Key, Written],
    ends: Mapping[int, SliceEnd],
    *,
    path_of: Mapping[Key, str] | None,
) -> dict[str, Any] | None:
    """None while shards are missing. inputs: how many; path_of: the shards' files, None where there
    is one file."""
    rows = vectors = 0
    files = []
    per_input = [0] * inputs
    for one in plan:
        end = ends.get(one.number)
        if end is None or any((one.number, n) not in shards for n in range(end.shards)):
            return None
        if len(end.spans) != len(one.spans):
            return None
        for span, (count, _) in zip(one.spans, end.spans, strict=True):
            per_input[span.source] += count
        for number in range(end.shards):
            shard = shards[one.number, number]
            if path_of is not None:
                files.append({"name": path_of[shard.key], "first_row": rows, **_file(shard)})
            rows += shard.rows
            vectors += shard.vectors
    found: dict[str, Any] = {"rows": vectors, "skipped": rows - vectors}
    found["rows_of_inputs"] = per_input
    if path_of is not None:
        found["slices"] = [list(ends[one.number][1:]) for one in plan]
        found["files"] = files
    return found


def skipped_rows(
    plan: Sequence[Slice],
    names: Sequence[str],
    shards: Mapping[Key, Written],
    ends: Mapping[int, SliceEnd],
    refused: Callable[[Written], Refusals],
    *,
    is_folder: bool,
) -> Iterator[dict[str, Any]]:
    """File, row (its line's number), index (that which its vector would have) and why: made as they
    are written. names: of the inputs; refused: of a shard."""
    rows = 0
    lines: dict[int, int] = {}
    for one in plan:
        end, before = ends[one.number], []
        for span, (_, read) in zip(one.spans, end.spans, strict=True):
            before.append(lines.get(span.source, 0))
            lines[span.source] = before[-1] + read
        for number in range(end.shards):
            shard = shards[one.number, number]
            first = one.first_index + shard.first if is_folder else rows
            for row, place, line, why in refused(shard):
                name = printable(names[one.spans[place].source])
                where = {"file": name, "row": before[place] + line, "index": first + row}
                yield {**where, "why": why}
            rows += shard.rows


def _file(shard: Written) -> dict[str, Any]:
    return {
        "first_index": (shard.slice << INDEX_BITS) + shard.first,
        "rows": shard.vectors,
        "read": shard.rows,
        "size": shard.size,
        "sha256": shard.sha256,
        "made_of": shard.made_of,
    }


def noted_by(manifest: Mapping[str, Any]) -> tuple[dict[Key, Written], dict[int, SliceEnd]]:
    """What a complete folder's manifest says of its shards and slices; nothing of what is none."""
    shards: dict[Key, Written] = {}
    ends: dict[int, SliceEnd] = {}
    with suppress(KeyError, TypeError, ValueError, AttributeError, IndexError):
        left = iter(manifest["files"])
        for number, (count, spans) in enumerate(manifest["slices"]):
            ends[number] = end_of((number, count, spans))
            for inner in range(count):
                file: Any = next(left, {})
                first = file["first_index"] & ((1 << INDEX_BITS) - 1)
                facts = (file["read"], file["rows"], file["size"], file["sha256"])
                one = written_of((number, inner, first, *facts, file["made_of"], ()))
                shards[one.key] = one
    return shards, ends


def made_of(digests: Iterator[str]) -> str:
    """Of a file of several shards."""
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(digest.encode())
    return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class Settled:
    """What a run chose by timing, which the next one on the same machine may choose otherwise."""

    dtype: str | None = None
    products: dict[str, str] = field(default_factory=dict)  # kind -> who computes it


def settled_by(manifest: Mapping[str, Any]) -> Settled:
    """Nothing of what is no such value."""
    model = manifest.get("model")
    if not isinstance(model, dict):
        return Settled()
    dtype, products = model.get("dtype"), model.get("products")
    named = products.items() if isinstance(products, dict) else ()
    return Settled(
        dtype if isinstance(dtype, str) else None,
        {kind: name for kind, name in named if isinstance(name, str)},
    )


def printable(name: str) -> str:
    """Of a file or a folder, whose name need not be UTF-8."""
    return name.encode(errors="replace").decode()
