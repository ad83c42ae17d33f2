"""Reading Parquet inputs: their rows, by row groups, and what their footers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from model.extras import how_to_install
from server.offline.places import InputFileError, Place, Refused
from server.offline.sources import Source

_UNREADABLE = object()


def parquet_rows(
    source: Source, place: Place, field: str, columns: Sequence[str]
) -> Iterator[tuple[int, Any, tuple[Any, ...]] | Refused]:
    """`before` is known here at once: the footer says how many rows lie before."""
    opened = _opened(source)
    end = len(opened.counts) if place.end is None else place.end
    place.before = opened.starts[place.begin]
    total = max(opened.starts[end] - opened.starts[place.begin], 1)
    import pyarrow

    number = 0
    try:
        file = opened.file
        _check_names(source, file.schema_arrow.names, (field, *columns), field)
        wanted = list(dict.fromkeys((field, *columns)))
        groups = list(range(place.begin, end))
        batches = file.iter_batches(1024, row_groups=groups, columns=wanted) if groups else ()
        for batch in batches:
            cells = {name: _values(batch.column(name)) for name in wanted}
            kept = zip(*(cells[name] for name in columns), strict=True) if columns else None
            for text in cells[field]:
                number += 1
                place.lines, place.read = number, number / total
                values = next(kept) if kept else ()
                if _UNREADABLE in values:
                    name = columns[values.index(_UNREADABLE)]
                    yield place.refused(number, _inexact(name))
                else:
                    yield number, text, values
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{place.at(number + 1)}: not to be read: {error}") from None
    source.check_unchanged()


def row_groups(source: Source) -> Sequence[int]:
    """How many rows each row group of a Parquet file has. Raises InputFileError."""
    return _opened(source).counts


def parquet_types(source: Source, names: Sequence[str]) -> Mapping[str, Any]:
    """The Arrow type of each column. Raises InputFileError, also for names it has not just once."""
    schema = _opened(source).file.schema_arrow
    _check_names(source, schema.names, names)
    return {one.name: one.type for one in schema}


class _Opened(NamedTuple):
    """An open file, and what its footer says: asked for once, as a file may have many groups."""

    file: Any
    counts: Sequence[int]
    starts: Sequence[int]  # rows before each group, and all of them


def _opened(source: Source) -> _Opened:
    import_parquet()
    import pyarrow

    try:
        opened: _Opened = source.parquet(_open)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{source.at(1)}: not to be read: {error}") from None
    return opened


def _open(file: Any) -> _Opened:
    file.seek(0)
    opened = import_parquet().ParquetFile(file)
    metadata = opened.metadata
    counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return _Opened(opened, counts, list(accumulate(counts, initial=0)))


def _check_names(
    source: Source, there: Sequence[str], names: Sequence[str], field: str | None = None
) -> None:
    for name in names:
        if name not in there:
            hint = " (--field names it)" if name == field else ""
            raise InputFileError(
                f"{source.name} has no column {name!r}{hint}; it has {', '.join(there)}"
            )
        if there.count(name) > 1:
            raise InputFileError(
                f"{source.name} has {there.count(name)} columns {name!r}: rename one of them"
            )


def _values(column: Any) -> list[Any]:
    """Values of Python, none of them rounded; _UNREADABLE for what Python has no value for."""
    try:
        found: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(cell) for cell in column]
    return found


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return _UNREADABLE


def _inexact(name: str) -> str:
    return (
        f"{name!r} cannot be kept as it is: a time with nanoseconds or outside of the years 1 to "
        "9999, or a text that is not UTF-8"
    )


def import_parquet() -> Any:
    """pyarrow.parquet. Raises InputFileError with how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputFileError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow.parquet
