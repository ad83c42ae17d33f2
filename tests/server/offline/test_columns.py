"""What is kept beside a text comes out as it went in, or its row is refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from server.offline.columns import Columns, columns_of
from server.offline.parquet_files import row_groups
from server.offline.places import InputFileError, Line, Refused, place_of
from server.offline.sources import opened
from server.offline.text_files import read_texts
from server.offline.texts import text_rows
from server.offline.vector_files import JsonLines, Parquet

DAY = datetime.datetime(2026, 1, 2, 3, 4, 5, 678_901)
DEEP: Any = json.loads("[" * 300 + "]" * 300)


def columns(paths: Sequence[Path], *names: str) -> Columns:
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(str(path))) for path in paths]
        return columns_of(names, names[0], sources)


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1.5, pyarrow.int32()),
        (True, pyarrow.float64()),
        (Decimal("2"), pyarrow.int64()),
        (DAY, pyarrow.timestamp("ms")),
        (DAY, pyarrow.date32()),
        (DAY.replace(tzinfo=datetime.UTC), pyarrow.timestamp("us")),
        (70000.0, pyarrow.float16()),
        (0.1, pyarrow.float32()),
        ({"a": 1, "b": 2}, pyarrow.struct({"a": pyarrow.int64()})),
        ([{"a": [1.5]}], pyarrow.list_(pyarrow.struct({"a": pyarrow.list_(pyarrow.int8())}))),
        ([float("nan")], "json"),
        (DEEP, "json"),
        (DEEP, pyarrow.list_(pyarrow.int8())),
        ((1 << 53) + 1, "double"),
    ],
)
def test_a_value_that_its_type_would_change_is_refused(value: Any, kind: Any) -> None:
    why = Columns(("id",), "id", {"id": kind}).problem([value])
    assert why is not None
    assert why.startswith("'id' ")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, pyarrow.float32()),
        (float("nan"), pyarrow.float64()),
        ([float("nan"), None], pyarrow.list_(pyarrow.float16())),
        (DAY, pyarrow.timestamp("ns")),
        (Decimal("1.1"), pyarrow.decimal128(9, 2)),
        ([("a", 1)], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        ("a", pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
        ({"a": [True, 1, 0.5, "x", None]}, "json"),
        (1 << 53, "double"),
    ],
)
def test_a_value_that_stays_what_it_is_is_kept(value: Any, kind: Any) -> None:
    assert Columns(("id",), "id", {"id": kind}).problem([value]) is None


def test_such_a_row_of_a_later_file_is_named_or_skipped(tmp_path: Path) -> None:
    first, later = tmp_path / "a.parquet", tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"id": pyarrow.array([1], pyarrow.int32())}), first)
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "id": [1.5, None]}), later)
    rows = text_rows("text", columns([first, later], "id"))
    with opened(str(later)) as source:
        refused = [
            getattr(row, "why", None) for row in rows.read(source, place_of(source, skip=True))
        ]
        assert refused == ["'id' is no int32, which the first rows have", "no id in 'id'"]
        with pytest.raises(InputFileError, match=r"b\.parquet, row 1: 'id' is no int32"):
            list(rows.read(source, place_of(source)))


@pytest.mark.parametrize(
    "before",
    [
        [],  # an empty file
        [{"id": None, "text": "x"}],
        [{"id": None, "text": "x" * 1000}] * 80,
    ],
)
def test_the_first_file_with_a_value_tells_the_type(tmp_path: Path, before: list[object]) -> None:
    files = [lines(tmp_path / "a.jsonl", *before), lines(tmp_path / "b.jsonl", {"id": "abc"})]
    assert columns(files, "id").written([("abc",)]) == {"id": ["abc"]}
    assert columns(files, "id").described == {"id": "string"}


def test_a_first_row_or_a_run_of_nulls_that_is_long_is_looked_through(tmp_path: Path) -> None:
    long = lines(tmp_path / "a.jsonl", {"text": "x" * 100_000, "id": 7})
    assert columns([long], "id").described == {"id": "int64"}
    nulls = [{"id": None, "text": "x" * 1000}] * 80
    assert columns([lines(tmp_path / "b.jsonl", *nulls, {"id": 7})], "id").types == {"id": "int64"}


def test_a_field_without_a_value_is_text_and_nothing_else(tmp_path: Path) -> None:
    kept = columns([lines(tmp_path / "a.jsonl", {"id": 1, "n": None})], "id", "n")
    assert kept.problem([1, "abc"]) is None
    assert kept.written([(1, "abc")])["n"] == ["abc"]
    assert "leave it out of --keep" in (kept.problem([1, 7]) or "")


def test_a_field_that_no_row_has_is_named(tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"id": 1, "text": "x"})
    with pytest.raises(InputFileError, match=r"have no field 'nope' .*; they have id, text"):
        columns([file], "id", "nope")


def test_a_name_that_two_columns_have_is_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array(["x"]), pyarrow.array([1]), pyarrow.array([2])], ["text", "id", "id"]
    )
    parquet.write_table(twice, file)
    with pytest.raises(InputFileError, match="has 2 columns 'id'"):
        columns([file], "id")


NANOS = 1_767_323_045_678_901_234
NS = pyarrow.timestamp("ns")


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([1, 1 << 60], pyarrow.timestamp("ms")),
        pyarrow.array([[1000], [1001]], pyarrow.list_(pyarrow.int64())).cast(pyarrow.list_(NS)),
        pyarrow.StructArray.from_arrays([pyarrow.array([1000, 1001], NS)], ["at"]),
    ],
    ids=["no year", "in a list", "in a struct"],
)
def test_what_python_has_no_value_for_is_refused(tmp_path: Path, values: Any) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "at": values}), file)
    with opened(str(file)) as source:
        found = list(read_texts(source, "text", place_of(source, skip=True), ["at"]))
        assert [row.number for row in found] == [1, 2]
        assert [isinstance(row, Refused) for row in found] == [False, True]
        with pytest.raises(InputFileError, match=r"a\.parquet, row 2: 'at' cannot be kept"):
            list(read_texts(source, "text", None, ["at"]))


@pytest.mark.parametrize(
    ("kind", "number", "text"),
    [
        (NS, NANOS, "2026-01-02T03:04:05.678901234"),
        (NS, -1, "1969-12-31T23:59:59.999999999"),
        (pyarrow.timestamp("ns", "UTC"), NANOS, "2026-01-02T03:04:05.678901234+00:00"),
        (pyarrow.timestamp("ns", "+01:00"), NANOS, "2026-01-02T04:04:05.678901234+01:00"),
        (pyarrow.time64("ns"), 3_000_000_001, "00:00:03.000000001"),
        (pyarrow.duration("ns"), 1_000_000_001, "0:00:01.000000001"),
        (pyarrow.duration("ns"), 86_400_000_001_001, "1 day, 0:00:00.000001001"),
    ],
)
def test_nanoseconds_are_kept_as_they_are(
    tmp_path: Path, kind: Any, number: int, text: str
) -> None:
    """Beside whole microseconds and none; in JSON lines as text."""
    file = tmp_path / "a.parquet"
    at = pyarrow.array([number, number // 1000 * 1000, None], pyarrow.int64()).cast(kind)
    parquet.write_table(pyarrow.table({"text": list("xyz"), "id": [1, 2, 3], "at": at}), file)
    kept = columns([file], "id", "at")
    with opened(str(file)) as source:
        rows = list(text_rows("text", kept).read(source, place_of(source)))
    assert not any(isinstance(row, Refused) for row in rows)
    written = kept.written([row.values for row in rows])
    typed = {name: (values, kept.arrow_type) for name, values in written.items()}
    for form in (Parquet(), JsonLines()):
        with (tmp_path / form.suffix).open("wb") as target:
            form.write(target, np.zeros((3, 2), np.float32), range(3), typed)
    back = parquet.read_table(tmp_path / ".parquet")["at"]
    assert back.type == kind
    assert back.combine_chunks().equals(at)
    lines = [json.loads(line)["at"] for line in (tmp_path / ".jsonl").read_text().splitlines()]
    assert lines[0] == text
    assert lines[1:] == [lines[1], None]


def test_a_time_that_arrow_would_give_as_another_is_refused(tmp_path: Path) -> None:
    """INT96, as Spark writes it: Arrow reads the last day of 9999 as one of 1816."""
    file = tmp_path / "a.parquet"
    days = [DAY, DAY.replace(year=9999), DAY.replace(year=1677), None, DAY.replace(year=2262)] * 500
    table = pyarrow.table({"text": ["x"] * 2500, "at": days, "id": range(2500)})
    parquet.write_table(table, file, use_deprecated_int96_timestamps=True, row_group_size=900)
    with opened(str(file)) as source:
        place = place_of(source, 1, 3, skip=True)
        found = list(read_texts(source, "text", place, ["at"]))
    assert len(found) == 1600
    for row, day in zip(found, days[900:], strict=True):
        if day is not None and day.year in (9999, 1677):
            assert isinstance(row, Refused)
            assert "'at' cannot be kept as it is" in row.why
        else:
            assert isinstance(row, Line)
            assert row.values == (day,)


def test_nanoseconds_that_the_first_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Whole microseconds are no nanoseconds, whatever they were called."""
    first, later = tmp_path / "a.parquet", tmp_path / "b.parquet"
    micro = pyarrow.array([1], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": ["x"], "id": micro}), first)
    nano = pyarrow.array([5000, 5001], NS)
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "id": nano}), later)
    rows = text_rows("text", columns([first, later], "id"))
    with opened(str(later)) as source:
        found = [
            getattr(row, "why", None) for row in rows.read(source, place_of(source, skip=True))
        ]
    assert found == [None, "'id' is no timestamp[us], which the first rows have"]


def test_row_groups_are_asked_for_once(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": list("abc")}), tmp_path / "a.parquet", 2)
    with opened(str(tmp_path / "a.parquet")) as source:
        assert row_groups(source) == [2, 1]
        assert row_groups(source) is row_groups(source)
        rows = list(read_texts(source, "text", place_of(source, 1, 2)))
        assert [row.place.at(row.number) for row in rows] == [f"{source.name}, row 3"]
