"""Reading bulk inputs, a row at a time: text, JSON lines, Parquet.

Owns every refusal of a row, by its number. Knows nothing of models or outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.extras import how_to_install
from model.user_files import UTF8_MARK
from server.api import json_text
from server.offline.sources import Kind, Source

MAX_LINE_BYTES = 64 << 20
"""A longer line is refused: a row is held several times over while it is read and tokenized."""


class InputFileError(Exception):
    """A row of the input cannot be used; the message holds its number."""


class Line(NamedTuple):
    """One text, and the number of its line (or of its row in Parquet)."""

    number: int
    text: str


def read_texts(source: Source, field: str) -> Iterator[Line]:
    """One text a line; or `field` of each JSON line (or a JSON string); or a Parquet column."""
    if source.kind is Kind.TEXT:
        yield from _text_lines(source)
        return
    if source.kind is Kind.PARQUET:
        values: Iterator[tuple[int, Any]] = _parquet_column(source, field)
    else:
        values = _field_of_lines(source, field)
    for number, text in values:
        if not isinstance(text, str):
            raise InputFileError(
                f"{source.at(number)}: expected a string"
                + ("" if source.kind is Kind.PARQUET else f" or an object with one in {field!r}")
            )
        if not text:
            raise InputFileError(f"{source.at(number)}: the text is empty")
        if len(text) > MAX_LINE_BYTES:  # of a Parquet file: lines were measured before
            raise _too_long(source, number)
        yield Line(number, text)


def read_objects(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of JSON lines, numbered."""
    for number, value in _json_values(source):
        if not isinstance(value, dict):
            raise InputFileError(f"{source.at(number)}: expected a JSON object")
        yield number, value


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends and marks: files joined by `cat` have a mark in the middle."""
    source.file.seek(0)
    for number, raw in enumerate(iter(lambda: source.file.readline(MAX_LINE_BYTES), b""), 1):
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raise _too_long(source, number)
        if raw == UTF8_MARK:  # and nothing after it
            return
        yield number, raw.removeprefix(UTF8_MARK).rstrip(b"\r\n")


def _too_long(source: Source, number: int) -> InputFileError:
    return InputFileError(
        f"{source.at(number)}: longer than {MAX_LINE_BYTES >> 20} MiB: split the text"
    )


def _decoded(source: Source, number: int, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InputFileError(
            f"{source.at(number)}: not UTF-8: convert the file first "
            "(from Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def _text_lines(source: Source) -> Iterator[Line]:
    lines = _lines(source)
    for number, raw in lines:
        if not raw:
            last = not any(rest.strip() for _, rest in lines)
            hint = " (a blank line at the end: remove it)" if last else ""
            raise InputFileError(f"{source.at(number)}: the text is empty{hint}")
        yield Line(number, _decoded(source, number, raw))


def _json_values(source: Source) -> Iterator[tuple[int, Any]]:
    """Blank lines are no values and are left out, as other readers do."""
    for number, raw in _lines(source):
        if not raw.strip():
            continue
        text = _decoded(source, number, raw)
        try:
            yield number, json_text.loads(raw)
        except ValueError as error:
            if text.lstrip().startswith("[") and number == 1:
                raise InputFileError(
                    f"{source.at(number)}: a JSON array over several lines; a value a line is "
                    "needed (jq -c '.[]' FILE > FILE.jsonl)"
                ) from None
            why = re.sub(r": line \d+ column (\d+) \(char \d+\)", r" at column \1", str(error))
            raise InputFileError(
                f"{source.at(number)}: not a line of JSON ({why[:1].lower()}{why[1:]})"
            ) from None


def _field_of_lines(source: Source, field: str) -> Iterator[tuple[int, Any]]:
    for number, value in _json_values(source):
        if isinstance(value, list) and number == 1:
            raise InputFileError(
                f"{source.at(number)}: a JSON array; a value a line is needed "
                "(jq -c '.[]' FILE > FILE.jsonl)"
            )
        if isinstance(value, dict) and field not in value:
            hint = "--field names it"
            if "custom_id" in value and "body" in value:
                hint = "for OpenAI's batch files: --openai-batch"
            raise InputFileError(f"{source.at(number)}: no field {field!r} ({hint})")
        yield number, value[field] if isinstance(value, dict) else value


def _parquet_column(source: Source, field: str) -> Iterator[tuple[int, Any]]:
    parquet = import_parquet()
    import pyarrow

    source.file.seek(0)
    number = 0
    try:
        file = parquet.ParquetFile(source.file)
        names = file.schema_arrow.names
        if field not in names:
            raise InputFileError(
                f"{source.name} has no column {field!r} (--field names it); it has "
                f"{', '.join(names)}"
            )
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, value
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{source.at(number + 1)}: not to be read: {error}") from None


def import_parquet() -> Any:
    """pyarrow.parquet. Raises InputFileError with how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputFileError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow.parquet
