"""One output file that grows shard by shard: the same as its shards, and proven when it goes on."""

from __future__ import annotations

import io
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from server.offline import parquet_footer
from server.offline.joined import Joined
from server.offline.parts import Parts, Proof, Shard, Written
from server.offline.vector_files import FORMATS, VectorFormat

ROWS = np.random.default_rng(3).standard_normal((23, 8)).astype(np.float32)
CUTS = (0, 5, 5, 12, 23)  # of its shards, one of them without rows


def shards_in(parts: Parts, form: VectorFormat) -> list[Written]:
    found = []
    for number, (first, end) in enumerate(pairwise(CUTS)):
        with parts.replacing(parts.path((0, number))) as file:
            form.write(file, ROWS[first:end], range(first, end))
            proof = Proof.of(file, f"{number}" * 64)
        count = end - first
        facts = (first, count, count, proof.size, proof.sha256, proof.made_of)
        found.append(Written(0, number, *facts))
    return found


def shard_of(written: Written) -> Shard:
    return Shard(*written.key, written.first, written.rows, written.made_of)


def is_known(shard: Written) -> bool:
    return True


@pytest.fixture(params=[".npy", ".jsonl", ".parquet"])
def form(request: pytest.FixtureRequest) -> VectorFormat:
    return FORMATS[request.param]()


@pytest.fixture
def parts(tmp_path: Path, form: VectorFormat) -> Parts:
    parts = Parts(tmp_path / "out.parts", form.suffix, 0o600)
    parts.make()
    return parts


def read_back(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        assert table["index"].to_pylist() == list(range(len(ROWS)))
        return np.stack(table["embedding"].to_pylist()).astype(np.float32)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return np.array([line["embedding"] for line in lines], dtype=np.float32)


def test_it_holds_the_rows_of_its_shards_once(
    tmp_path: Path, parts: Parts, form: VectorFormat
) -> None:
    target = tmp_path / f"out{form.suffix}"
    shards = shards_in(parts, form)
    joined = Joined(parts, form, "run")
    joined.open()
    for shard in shards:
        joined.add(shard)
        assert not parts.path(shard.key).exists()
    proof = joined.finish(target)
    assert proof.holds(target)
    np.testing.assert_array_equal(read_back(target), ROWS)


@pytest.mark.parametrize("done", range(5))
def test_a_run_that_was_killed_goes_on(
    tmp_path: Path, parts: Parts, form: VectorFormat, done: int
) -> None:
    """After each shard, in the middle of the next one, and behind the last step but one."""
    target = tmp_path / f"out{form.suffix}"
    shards = shards_in(parts, form)
    joined = Joined(parts, form, "run")
    joined.open()
    for shard in shards[:done]:
        joined.add(shard)
    if done == len(shards):
        joined.finish(target)
    else:
        with parts.joined.open("ab") as file:  # half of a shard
            file.write(b"half")
    other = Joined(parts, form, "another run")
    other.read(target, is_known)
    assert other.shards == []
    again = Joined(parts, form, "run")
    again.read(target, is_known)
    assert again.shards == shards[:done]
    assert [again.has(shard_of(one), place) for place, one in enumerate(shards[:done])] == (
        [True] * done
    )
    again.open()
    for shard in shards[done:]:
        again.add(shard)
    again.finish(target)
    np.testing.assert_array_equal(read_back(target), ROWS)


def test_what_was_changed_is_cut_off(tmp_path: Path, parts: Parts, form: VectorFormat) -> None:
    shards = shards_in(parts, form)
    joined = Joined(parts, form, "run")
    joined.open()
    for shard in shards:
        joined.add(shard)
    raw = bytearray(parts.joined.read_bytes())
    raw[-1] ^= 1
    parts.joined.write_bytes(raw)
    again = Joined(parts, form, "run")
    again.read(tmp_path / "out", is_known)
    assert again.shards == shards[:3]
    os.truncate(parts.joined, 0)
    again = Joined(parts, form, "run")
    again.read(tmp_path / "out", is_known)
    assert again.shards == []


@pytest.mark.parametrize("form", [FORMATS[".parquet"]()])
def test_a_changed_note_is_none_nor_is_any_behind_it(
    tmp_path: Path, parts: Parts, form: VectorFormat
) -> None:
    """Whatever the change: a number that still is one, too."""
    shards = shards_in(parts, form)
    joined = Joined(parts, form, "run")
    joined.open()
    for shard in shards:
        joined.add(shard)
    whole = parts.joined_notes.read_bytes()
    lines = whole.splitlines(keepends=True)
    begin = len(b"".join(lines[:3]))  # of the third shard
    for at in range(begin, begin + len(lines[3])):
        raw = bytearray(whole)
        raw[at] ^= 1
        parts.joined_notes.write_bytes(raw)
        again = Joined(parts, form, "run")
        again.read(tmp_path / "out", is_known)
        assert again.shards == shards[:2], raw[begin:]


def test_a_shard_of_which_not_all_is_known_is_cut_off_with_all_behind_it(
    tmp_path: Path, parts: Parts, form: VectorFormat
) -> None:
    shards = shards_in(parts, form)
    joined = Joined(parts, form, "run")
    joined.open()
    for shard in shards:
        joined.add(shard)
    joined.finish(tmp_path / "out")
    again = Joined(parts, form, "run")
    again.read(tmp_path / "out", lambda shard: shard.number != 2)
    assert again.shards == []  # the file that they were in has gone to its place
    again.open()
    assert parts.joined.read_bytes() == b""


def test_another_shard_in_a_place_goes_with_all_behind_it(
    tmp_path: Path, parts: Parts, form: VectorFormat
) -> None:
    shards = shards_in(parts, form)
    joined = Joined(parts, form, "run")
    joined.open()
    for shard in shards:
        joined.add(shard)
    assert joined.has(shard_of(shards[0]), 0)
    assert not joined.has(shard_of(shards[1]._replace(made_of="f" * 64)), 1)
    assert joined.shards == shards[:1]


def test_a_footer_is_the_same_when_it_is_written_again() -> None:
    """Of every kind of column, with statistics, page indexes and metadata of a user's."""
    table = pyarrow.table(
        {
            "b": [True, None, False],
            "s": ["a", "ä" * 400, None],
            "n": pyarrow.array([1, -(2**60), None], pyarrow.int64()),
            "d": pyarrow.array([1.5, None, -2.0], pyarrow.float64()),
            "l": [[1, 2], None, []],
            "t": pyarrow.array([{"x": 1, "y": "z"}, None, {"x": None, "y": "w"}]),
            "w": pyarrow.array([1, 2, 3], pyarrow.timestamp("us", tz="UTC")),
            "m": pyarrow.array([b"\0\xff", b"", None], pyarrow.binary()),
        }
    ).replace_schema_metadata({"k": "v" * 300})
    for options in ({}, {"write_page_index": True}, {"compression": "none", "version": "1.0"}):
        file = io.BytesIO()
        parquet.write_table(table, file, row_group_size=1, **options)
        _, _, footer = parquet_footer.split(file)
        assert parquet_footer.write(parquet_footer.read(footer)) == footer


def test_many_row_groups_are_one_file() -> None:
    """More than 15, from which on a list has a longer head, of dictionaries and of page indexes."""
    bodies, footers, shifts = [parquet_footer.MAGIC], [], []
    expected = []
    at = len(parquet_footer.MAGIC)
    for number in range(40):
        file = io.BytesIO()
        words = [f"w{n % 3}" for n in range(number + 1)]
        expected += words
        parquet.write_table(pyarrow.table({"w": words}), file, write_page_index=number % 2 == 0)
        begin, size, footer = parquet_footer.split(file)
        bodies.append(file.getvalue()[begin : begin + size])
        footers.append(footer)
        shifts.append(at - begin)
        at += size
    whole = io.BytesIO(b"".join(bodies) + parquet_footer.joined(footers, shifts))
    found = parquet.ParquetFile(whole)
    assert found.metadata.num_row_groups == 40
    assert found.read()["w"].to_pylist() == expected
    assert found.read_row_group(39)["w"].to_pylist() == expected[-40:]
