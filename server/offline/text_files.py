"""Reading bulk inputs, a row at a time: text, JSON lines, Parquet; all of one, or a span of it.

Owns every refusal of a row, by its number. Knows nothing of models or outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from model.user_files import UTF8_MARK
from server.api import json_text
from server.offline.kinds import Kind
from server.offline.parquet_files import parquet_rows
from server.offline.places import Line, Place, Refused, place_of
from server.offline.sources import ChangedError, Source

MAX_LINE_BYTES = 64 << 20
"""A longer line is refused: a row is held several times over while it is read and tokenized."""
_SKIPPED_BYTES = 1 << 20
"""What is read at once of a line that is not used."""


def read_texts(
    source: Source, field: str, place: Place | None = None, columns: Sequence[str] = ()
) -> Iterator[Line | Refused]:
    """One text a line; or `field` of each JSON line (or a JSON string); or a Parquet column.

    columns: other fields whose values are kept. Raises InputFileError for a bad row, or yields it
    where the place says so.
    """
    place = place or place_of(source)
    if source.kind is Kind.TEXT:
        yield from _text_lines(source, place)
        return
    if source.kind is Kind.PARQUET:
        values = parquet_rows(source, place, field, columns)
    else:
        values = _fields_of_lines(source, place, field, columns)
    for row in values:
        if isinstance(row, Refused):
            yield row
            continue
        number, text, kept = row
        if not isinstance(text, str):
            hint = "" if source.kind is Kind.PARQUET else f" or an object with one in {field!r}"
            yield place.refused(number, f"expected a string{hint}")
        elif not text:
            yield place.refused(number, "the text is empty")
        elif len(text) > MAX_LINE_BYTES:  # of a Parquet file: lines were measured before
            yield place.refused(number, _too_long())
        else:
            yield Line(place, number, text, kept)


def read_objects(
    source: Source, place: Place | None = None
) -> Iterator[tuple[int, dict[str, Any]] | Refused]:
    """The JSON objects of a file of JSON lines, numbered."""
    place = place or place_of(source)
    for row in _json_values(source, place):
        if isinstance(row, Refused):
            yield row
        elif not isinstance(row[1], dict):
            yield place.refused(row[0], "expected a JSON object")
        else:
            yield row


def _too_long() -> str:
    return f"longer than {MAX_LINE_BYTES >> 20} MiB: split the text"


def _lines(source: Source, place: Place) -> Iterator[tuple[int, bytes] | Refused]:
    """Lines without their ends and marks: files joined by `cat` have a mark in the middle.

    Those whose first byte lies in the span; the last one is read to its end. Raises ChangedError
    where the file ends before the span does.
    """
    file, end = source.open(), place.end
    position = max(place.begin - 1, 0)
    if not source.is_stream:
        file.seek(position)
    if place.begin:  # the line of the byte before is another span's
        position += _rest_of_line(file, place.size)
    number = 0
    while end is None or position < end:
        raw = file.readline(MAX_LINE_BYTES)
        if not raw:
            if position < (end or source.size or 0):
                raise ChangedError(f"{source.name} became shorter while it was read")
            break
        number += 1
        position += len(raw)
        place.lines = number
        if whole := end or source.size:
            place.read = min(1.0, (position - place.begin) / max(whole - place.begin, 1))
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            yield place.refused(number, _too_long())
            position += _rest_of_line(file, None)
        elif raw == UTF8_MARK:  # and nothing after it
            place.lines = number - 1
        else:
            yield number, raw.removeprefix(UTF8_MARK).rstrip(b"\r\n")
    if place.before is not None and end is not None:
        source.before = (end, place.before + place.lines)
    source.check_unchanged()


def _rest_of_line(file: Any, most: int | None) -> int:
    """Read to the next line's beginning; returns how many bytes, no more than about `most`."""
    count = 0
    while most is None or count <= most:
        raw = file.readline(_SKIPPED_BYTES)
        count += len(raw)
        if not raw or raw.endswith(b"\n"):
            break
    return count


def _decoded(place: Place, number: int, raw: bytes) -> str | Refused:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return place.refused(
            number,
            "not UTF-8: convert the file first (from Latin-1: iconv -f LATIN1 -t UTF-8)",
        )


def _text_lines(source: Source, place: Place) -> Iterator[Line | Refused]:
    lines = _lines(source, place)
    for row in lines:
        if isinstance(row, Refused):
            yield row
            continue
        number, raw = row
        if not raw:
            hint = ""
            if not place.skip:
                last = not any(isinstance(rest, Refused) or rest[1].strip() for rest in lines)
                hint = " (a blank line at the end: remove it)" if last else ""
            yield place.refused(number, f"the text is empty{hint}")
            continue
        text = _decoded(place, number, raw)
        yield text if isinstance(text, Refused) else Line(place, number, text)


def _json_values(source: Source, place: Place) -> Iterator[tuple[int, Any] | Refused]:
    """Blank lines are no values and are left out, as other readers do."""
    for row in _lines(source, place):
        if isinstance(row, Refused):
            yield row
            continue
        number, raw = row
        if not raw.strip():
            continue
        text = _decoded(place, number, raw)
        if isinstance(text, Refused):
            yield text
            continue
        try:
            value = json_text.loads(raw)
        except ValueError as error:
            yield place.refused(number, _no_json(text, number, place, error))
            continue
        yield number, value


def _no_json(text: str, number: int, place: Place, error: ValueError) -> str:
    if text.lstrip().startswith("[") and number == 1 and not place.begin:
        return (
            "a JSON array over several lines; a value a line is needed "
            "(jq -c '.[]' FILE > FILE.jsonl)"
        )
    why = re.sub(r": line \d+ column (\d+) \(char \d+\)", r" at column \1", str(error))
    return f"not a line of JSON ({why[:1].lower()}{why[1:]})"


def _fields_of_lines(
    source: Source, place: Place, field: str, columns: Sequence[str]
) -> Iterator[tuple[int, Any, tuple[Any, ...]] | Refused]:
    for row in _json_values(source, place):
        if isinstance(row, Refused):
            yield row
            continue
        number, value = row
        if isinstance(value, list) and number == 1 and not place.begin:
            yield place.refused(
                number, "a JSON array; a value a line is needed (jq -c '.[]' FILE > FILE.jsonl)"
            )
        elif isinstance(value, dict) and field not in value:
            hint = "--field names it"
            if "custom_id" in value and "body" in value:
                hint = "for OpenAI's batch files: --openai-batch"
            yield place.refused(number, f"no field {field!r} ({hint})")
        elif columns and not isinstance(value, dict):
            yield place.refused(number, f"no object, so there is no field {columns[0]!r}")
        elif isinstance(value, dict):
            yield number, value[field], tuple(value.get(name) for name in columns)
        else:
            yield number, value, ()
