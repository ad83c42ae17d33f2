"""Reading Parquet inputs: their rows, by row groups, and what their footers say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from model.extras import how_to_install
from server.offline.places import InputFileError, Place, Refused
from server.offline.sources import Source


def parquet_rows(
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
