"""Reading bulk inputs, a row at a time: text, JSON lines, Parquet; all of one, or a span of it.

Owns every refusal of a row, by its number. Knows nothing of models or outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from model.extras import how_to_install
from model.user_files import UTF8_MARK
from server.api import json_text
from server.offline.sources import Kind, Source

MAX_LINE_BYTES = 64 << 20
"""A longer line is refused: a row is held several times over while it is read and tokenized."""
_SKIPPED_BYTES = 1 << 20
"""What is read at once of a line that is not used."""


class InputFileError(Exception):
    """A row of the input cannot be used; the message holds its number."""


@dataclass(slots=True, eq=False)
class Place:
    """A span of an input while it is read; `begin` and `end` as Span has them.

    Its rows are numbered from 1. `before` is how many lines (rows of Parquet) of the file lie
    before it, None where nobody has counted; `lines` and `read` (a share) say how far it was read.
    """

    name: str
    kind: Kind
    begin: int = 0
    end: int | None = None
    span: int = 0  # within its slice
    skip: bool = False  # refused rows are yielded, not raised
    before: int | None = 0
    lines: int = 0
    read: float = 0.0

    @property
    def size(self) -> int | None:
        return None if self.end is None else self.end - self.begin

    def at(self, number: int) -> str:
        """The name of a row in messages: by its number in the file, where that is known."""
        what = "row" if self.kind is Kind.PARQUET else "line"
        if self.before is None:
            return f"{self.name}, {what} {number} after byte {self.begin}"
        return f"{self.name}, {what} {self.before + number}"

    def refused(self, number: int, why: str) -> Refused:
        """Raises InputFileError unless refused rows are skipped."""
        if not self.skip:
            raise InputFileError(f"{self.at(number)}: {why}")
        return Refused(self, number, why)


class Refused(NamedTuple):
    """A row that cannot be used, and why; never what it holds."""

    place: Place
    number: int
    why: str


class Line(NamedTuple):
    """One text, the number of its line (of its row in Parquet), and what is kept beside it."""

    place: Place
    number: int
    text: str
    values: tuple[Any, ...] = ()


def place_of(
    source: Source, begin: int = 0, end: int | None = None, *, span: int = 0, skip: bool = False
) -> Place:
    known = {0: 0, source.before[0]: source.before[1]}
    return Place(source.name, source.kind, begin, end, span, skip, known.get(begin))


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
        values = _parquet_rows(source, place, field, columns)
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

    Those whose first byte lies in the span; the last one is read to its end.
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


def _parquet_rows(
    source: Source, place: Place, field: str, columns: Sequence[str]
) -> Iterator[tuple[int, Any, tuple[Any, ...]] | Refused]:
    """`before` is known here at once: the footer says how many rows lie before."""
    counts = row_groups(source)
    end = len(counts) if place.end is None else place.end
    place.before = sum(counts[: place.begin])
    total = max(sum(counts[place.begin : end]), 1)
    import pyarrow

    number = 0
    try:
        file = source.parquet(_parquet_file)
        names = file.schema_arrow.names
        for name in (field, *columns):
            if name not in names:
                hint = " (--field names it)" if name == field else ""
                raise InputFileError(
                    f"{source.name} has no column {name!r}{hint}; it has {', '.join(names)}"
                )
        wanted = list(dict.fromkeys((field, *columns)))
        groups = list(range(place.begin, end))
        batches = file.iter_batches(1024, row_groups=groups, columns=wanted) if groups else ()
        for batch in batches:
            cells = {name: batch.column(name).to_pylist() for name in wanted}
            kept = zip(*(cells[name] for name in columns), strict=True) if columns else None
            for text in cells[field]:
                number += 1
                place.lines, place.read = number, number / total
                yield number, text, next(kept) if kept else ()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{place.at(number + 1)}: not to be read: {error}") from None
    source.check_unchanged()


def row_groups(source: Source) -> list[int]:
    """How many rows each row group of a Parquet file has. Raises InputFileError."""
    import_parquet()
    import pyarrow

    try:
        metadata = source.parquet(_parquet_file).metadata
        return [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{source.at(1)}: not to be read: {error}") from None


def parquet_types(source: Source) -> Mapping[str, Any]:
    """The Arrow type of each column. Raises InputFileError."""
    row_groups(source)
    return {one.name: one.type for one in source.parquet(_parquet_file).schema_arrow}


def _parquet_file(file: Any) -> Any:
    file.seek(0)
    return import_parquet().ParquetFile(file)


def import_parquet() -> Any:
    """pyarrow.parquet. Raises InputFileError with how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputFileError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow.parquet
