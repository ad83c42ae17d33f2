"""`nv-embed encode`: a file of texts to a file of vectors, without a server.

Reads text or JSON lines a chunk at a time; writes to a temporary file that is renamed when whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import orjson
from tqdm import tqdm

from model.errors import InputError, NonFiniteError
from model.tokenizer import Truncation

if TYPE_CHECKING:
    from model.encoder import Encoder

_CHUNK = 4096
"""Texts in memory at once."""


class InputFileError(Exception):
    """A line of the input cannot be used; the message holds its number."""


def is_json_lines(path: Path) -> bool:
    return path.suffix in (".jsonl", ".ndjson", ".json")


def read_texts(path: Path, field: str) -> Iterator[str]:
    """The texts of a file: one a line, or `field` of each JSON line (or a JSON string).

    Raises InputFileError with the number of a bad line.
    """
    json_lines = is_json_lines(path)
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                text = _json_text(raw, field) if json_lines else raw.decode().rstrip("\r\n")
            except (ValueError, KeyError) as error:
                raise InputFileError(f"{path}, line {number}: {_reason(error, field)}") from None
            if not text:
                raise InputFileError(f"{path}, line {number}: the text is empty")
            yield text


def count_texts(path: Path, field: str) -> int:
    """How many texts a file holds. Raises InputFileError for a bad line, or when it holds none:
    before a model is loaded."""
    count = sum(1 for _ in read_texts(path, field))
    if not count:
        raise InputFileError(f"{path} holds no text")
    return count


def _json_text(raw: bytes, field: str) -> str:
    value = orjson.loads(raw)
    text = value[field] if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f"expected a string or an object with a string in {field!r}")
    return text


def _reason(error: Exception, field: str) -> str:
    if isinstance(error, KeyError):
        return f"no field {field!r} (--field names it)"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8: convert the file first (iconv -f LATIN1 -t UTF-8)"
    return f"{error}"


def encode_file(
    encoder: Encoder,
    source: Path,
    target: Path,
    *,
    count: int,
    field: str,
    instruction: str,
    truncate: Truncation,
) -> None:
    """Embed the `count` texts of `source` into `target` (.npy, or JSON lines)."""
    texts = read_texts(source, field)
    width = encoder.runner.info.width
    with (
        _replacing(target) as file,
        tqdm(total=count, desc="Embedding", unit=" texts", disable=None) as bar,
    ):
        if target.suffix == ".npy":
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
            np.lib.format.write_array_header_1_0(file, header)  # type: ignore[no-untyped-call]
        done = 0
        while chunk := list(islice(texts, _CHUNK)):
            try:
                vectors = encoder.encode(chunk, instruction, truncate=truncate, progress=False)
            except InputError as error:
                number = done + (error.index or 0) + 1
                raise InputFileError(f"{source}, line {number}: {error}") from None
            except NonFiniteError as error:
                number = done + error.rows[0] + 1
                raise InputFileError(f"{source}, line {number}: {error}") from None
            if target.suffix == ".npy":
                file.write(vectors.astype("<f4").tobytes())
            else:
                for index, vector in enumerate(vectors, done):
                    line = {"index": index, "embedding": vector}
                    file.write(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
            done += len(chunk)
            bar.update(len(chunk))
    assert done == count, f"{source} changed while it was read: {count}, then {done} texts"


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the target's name when the block ends well, and vanishes otherwise."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
