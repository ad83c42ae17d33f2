"""What is kept beside a text comes out as it went in, or its row is refused."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from server.offline.columns import Columns, columns_of
from server.offline.parquet_files import row_groups
from server.offline.places import InputFileError, Refused, place_of
from server.offline.sources import opened
from server.offline.text_files import read_texts
from server.offline.texts import text_rows

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


@pytest.mark.parametrize(
    "values",
    [
        pyarrow.array([1000, 1001], pyarrow.timestamp("ns")),
        pyarrow.array([1, 1 << 60], pyarrow.timestamp("ms")),
    ],
    ids=["nanoseconds", "no year"],
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


def test_row_groups_are_asked_for_once(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": list("abc")}), tmp_path / "a.parquet", 2)
    with opened(str(tmp_path / "a.parquet")) as source:
        assert row_groups(source) == [2, 1]
        assert row_groups(source) is row_groups(source)
        rows = list(read_texts(source, "text", place_of(source, 1, 2)))
        assert [row.place.at(row.number) for row in rows] == [f"{source.name}, row 3"]
