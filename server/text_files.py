"""Reading bulk inputs, a row at a time: text, JSON lines, Parquet, OpenAI batch files.

Knows nothing of models or outputs. A bad row is named by its number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"


class InputFileError(Exception):
    """A row of the input cannot be used; the message holds its number."""


def read_texts(path: Path, field: str) -> Iterator[str]:
    """One text a line; or `field` of each JSON line (or a JSON string); or a Parquet column."""
    if path.suffix == PARQUET:
        values: Iterator[tuple[int, Any]] = _parquet_column(path, field)
    elif path.suffix in JSON_LINES:
        values = _parsed_lines(path, lambda raw: _field(orjson.loads(raw), field))
    else:
        values = _parsed_lines(path, lambda raw: raw.decode().rstrip("\r\n"))
    for number, text in values:
        if not isinstance(text, str):
            raise InputFileError(
                f"{path}, line {number}: expected a string or an object with a string in {field!r}"
            )
        if not text:
            raise InputFileError(f"{path}, line {number}: the text is empty")
        yield text


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of JSON lines."""
    for number, value in _parsed_lines(path, orjson.loads):
        if not isinstance(value, dict):
            raise InputFileError(f"{path}, line {number}: expected a JSON object")
        yield value


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed_lines(path: Path, parse: Callable[[bytes], Any]) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                value = parse(raw)
            except KeyError as error:
                raise InputFileError(
                    f"{path}, line {number}: no field {error} (--field names it)"
                ) from None
            except UnicodeDecodeError:
                raise InputFileError(
                    f"{path}, line {number}: not UTF-8: convert the file first "
                    "(iconv -f LATIN1 -t UTF-8)"
                ) from None
            except ValueError as error:
                raise InputFileError(f"{path}, line {number}: {error}") from None
            yield number, value


def _field(value: Any, field: str) -> Any:
    return value[field] if isinstance(value, dict) else value


def _parquet_column(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    parquet = import_parquet()
    file = parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise InputFileError(
            f"{path} has no column {field!r} (--field names it); it has "
            f"{', '.join(file.schema_arrow.names)}"
        )
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield number, value


def import_parquet() -> Any:
    """pyarrow.parquet. Raises InputFileError with how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputFileError("Parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow.parquet
