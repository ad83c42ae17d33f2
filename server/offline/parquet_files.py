"""Reading Parquet inputs: their rows, by row groups, and what their footers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from model.extras import how_to_install
from server.offline.places import InputFileError, Place, Refused
from server.offline.sources import Source
from server.offline.times import UNREADABLE, values_of

_MOST_INT96_US = ((1 << 63) - 1) // 1000
"""Before and after 1970 that nanoseconds reach."""


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
        wrapped = _wrapped(source, opened, groups, columns)
        batches = file.iter_batches(1024, row_groups=groups, columns=wanted) if groups else ()
        for batch in batches:
            cells = {name: values_of(batch.column(name)) for name in wanted}
            kept = zip(*(cells[name] for name in columns), strict=True) if columns else None
            for text in cells[field]:
                number += 1
                place.lines, place.read = number, number / total
                values = next(kept) if kept else ()
                if UNREADABLE in values or number in wrapped:
                    name = wrapped.get(number) or columns[values.index(UNREADABLE)]
                    yield place.refused(number, _inexact(name))
                else:
                    yield number, text, values
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{place.at(number + 1)}: not to be read: {error}") from None
    source.check_unchanged()


def _wrapped(
    source: Source, opened: _Opened, groups: Sequence[int], columns: Sequence[str]
) -> Mapping[int, str]:
    """Rows of these groups, numbered from 1, with a time that Arrow would give as another one, and
    the column's name: it reads INT96, as Spark writes it, as nanoseconds, and 9999 as 1816."""
    import pyarrow
    from pyarrow import compute

    schema = opened.file.schema
    every = [schema.column(place) for place in range(len(schema))]
    names = [one.path for one in every if one.physical_type == "INT96" and one.path in columns]
    found: dict[int, str] = {}
    if not (names and groups):
        return found
    exact = import_parquet().ParquetFile(source.open(), coerce_int96_timestamp_unit="us")
    number = 1
    for batch in exact.iter_batches(1024, row_groups=groups, columns=names):
        for name in names:
            micros = batch.column(name).cast(pyarrow.int64())
            outside = compute.greater(compute.abs(micros), _MOST_INT96_US)
            for place in compute.indices_nonzero(outside).to_pylist():
                found.setdefault(number + place, name)
        number += len(batch)
    return found


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


def _inexact(name: str) -> str:
    return (
        f"{name!r} cannot be kept as it is: nanoseconds within a list or a struct, a time outside "
        "of the years 1 to 9999 (1678 to 2261 as INT96), or a text that is not UTF-8; cast the "
        "column first, or leave it out"
    )


def import_parquet() -> Any:
    """pyarrow.parquet. Raises InputFileError with how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputFileError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow.parquet
