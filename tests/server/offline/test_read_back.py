"""What `nv-embed encode` writes, in the hands of others: Arrow's datasets, pandas, LanceDB; and how
much of the disk it takes meanwhile.

pandas and LanceDB are no packages of the tests: `make test-bulk` has them, and larger numbers.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import dataset, parquet

from server import cli

pytestmark = pytest.mark.whole

ROWS = int(os.environ.get("BULK_ROWS", "2400"))


@pytest.fixture
def encode(
    golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Embeds a folder of JSON lines and Parquet, with an id for each row and a language."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    rows = [{"id": f"d{n}", "text": f"row {n}", "lang": "en"} for n in range(ROWS)]
    half = ROWS // 2
    Path("in/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:half]))
    table = pyarrow.Table.from_pylist(rows[half:])
    parquet.write_table(table, "in/b.parquet", row_group_size=ROWS // 10)

    def run(*arguments: object) -> None:
        options = ["--model", str(golden_checkpoint), "--device", "cpu"]
        options += ["--runner", "tests.server.runners:Hashing"]
        assert cli.main(["encode", "in", *map(str, arguments), *options]) == 0

    return run


KEPT = ["--id-field", "id", "--keep", "lang"]


def check(table: pyarrow.Table) -> None:
    assert sorted(table["id"].to_pylist()) == sorted(f"d{n}" for n in range(ROWS))
    assert len(set(table["index"].to_pylist())) == ROWS
    assert set(table["lang"].to_pylist()) == {"en"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_is_a_dataset_of_arrow(encode: Any, dtype: str) -> None:
    shards = ["--format", "parquet", "--shard-size", ROWS // 12, "--output-dtype", dtype]
    encode("-o", "out/", *KEPT, *shards)
    found = dataset.dataset("out", format="parquet", exclude_invalid_files=True)
    assert len(found.files) >= 12
    check(found.to_table())
    assert found.filter(dataset.field("id") == "d7").count_rows() == 1


def test_pandas_reads_the_folder_and_the_file(encode: Any) -> None:
    pandas = pytest.importorskip("pandas")
    encode("-o", "out.parquet", *KEPT)
    encode("-o", "out/", *KEPT, "--format", "parquet", "--shard-size", ROWS // 12)
    encode("-o", "out.jsonl.gz", *KEPT)
    whole = pandas.read_parquet("out.parquet")
    assert list(whole["id"]) == [f"d{n}" for n in range(ROWS)]
    assert list(whole["index"]) == list(range(ROWS))
    files = sorted(Path("out").glob("*.parquet"))
    parts = pandas.concat([pandas.read_parquet(file) for file in files])
    assert list(parts["id"]) == list(whole["id"])
    lines = pandas.read_json("out.jsonl.gz", lines=True)
    for other in (parts, lines):
        got, expected = np.stack(other["embedding"]), np.stack(whole["embedding"])
        np.testing.assert_allclose(got, expected, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_lancedb_takes_it_and_finds_each_by_its_vector(encode: Any, dtype: str) -> None:
    lancedb = pytest.importorskip("lancedb")
    encode("-o", "out.parquet", *KEPT, "--output-dtype", dtype)
    table = parquet.read_table("out.parquet")
    store = lancedb.connect("lance").create_table("texts", table)
    assert store.count_rows() == ROWS
    vector = np.array(table["embedding"][5].as_py(), dtype=dtype)
    query = store.search(vector, vector_column_name="embedding").limit(1)
    assert query.to_list()[0]["id"] == "d5"


def used(folder: Path) -> int:
    """Bytes of all files but the input's, while some come and go."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names if not at.endswith("/in") else ():
            try:
                total += os.stat(os.path.join(at, name)).st_size
            except FileNotFoundError:
                continue
    return total


@pytest.mark.parametrize("output", ["out.npy", "out.parquet", "out.jsonl", "out/"])
def test_the_disk_holds_the_output_once(
    encode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """At any moment no more than 1.1 times the output: a shard more, of twenty or so here."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, used(tmp_path))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    encode("-o", output, "--shard-size", ROWS // 20)
    done.set()
    watcher.join()
    assert peak <= 1.1 * used(tmp_path)
    assert peak >= 0.9 * used(tmp_path)  # it was looked at
