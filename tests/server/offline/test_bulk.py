"""`nv-embed encode` on many inputs, in parts, on several devices: the same as one run of one."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from model.batch import Encoding, RunnerOptions
from model.tokenizer import NVEmbedTokenizer
from server import cli
from server.api.vector_format import int8_scale
from server.offline import bulk, call, crew, inputs, slices, stores
from server.offline.columns import NONE
from server.offline.ledger import Ledger
from server.offline.parts import SliceEnd, Written
from server.offline.reader import Input
from server.offline.shard_writer import Recipe
from server.offline.shards import chunks_of
from server.offline.texts import text_rows
from tests.server.offline.conftest import Encode
from tests.server.processes import ROOT
from tests.server.runners import Hashing, vector_of

pytestmark = pytest.mark.whole

RUNNERS = "tests.server.runners:"
Files = dict[str, bytes]


@pytest.fixture
def vectors_of(golden_checkpoint: Path) -> Callable[[Sequence[str]], np.ndarray]:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    return lambda texts: np.stack(
        [vector_of(tokenizer.encode(text, max_tokens=999).ids) for text in texts]
    )


def contents(folder: Path | str) -> Files:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def manifest_of(folder: Path | str) -> dict[str, Any]:
    found = json.loads((Path(folder) / "manifest.json").read_text())
    assert isinstance(found, dict)
    return found


def write_rows(path: str, count: int, seed: int = 7) -> list[dict[str, Any]]:
    """JSON lines (or Parquet) of texts of many lengths, with an id."""
    dice = random.Random(seed)
    words = ["some", "words", "of", "a", "line", "größer", "日本語"]
    rows = [
        {"id": f"d{n}", "text": " ".join(dice.choices(words, k=dice.randint(1, 12))), "n": n}
        for n in range(count)
    ]
    if path.endswith(".parquet"):
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, path, row_group_size=max(1, count // 12))
    else:
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


# ---- parts


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_parts_are_one_run(encode: Encode, tmp_path: Path, name: str) -> None:
    """In any order, each by itself, with options that carry, shrink and compress."""
    write_rows(name, 600)
    options = ["--shard-size", 20, "--format", "parquet", "--id-field", "id", "--keep", "n"]
    options += ["--output-dtype", "float16", "--compression", "zstd"]
    assert encode(name, "-o", "one/", *options) == 0
    assert len(manifest_of("one")["files"]) > 20
    for part in (2, 3, 1):
        assert not manifest_of("parts").get("complete") if part != 2 else True
        assert encode(name, "-o", "parts/", *options, "--part", f"{part}/3") == 0
    assert contents("parts") == contents("one")
    assert encode(name, "-o", "parts/", *options, "--part", "2/3") == 0  # there is nothing to do
    assert contents("parts") == contents("one")


def test_parts_of_other_numbers_and_a_whole_run_go_on_with_each_other(
    encode: Encode, tmp_path: Path
) -> None:
    write_rows("in.jsonl", 400)
    options = ["in.jsonl", "--shard-size", 20]
    assert encode(*options, "-o", "one/") == 0
    assert encode(*options, "-o", "parts/", "--part", "2/3") == 0
    some = contents("parts").keys()
    assert encode(*options, "-o", "parts/", "--part", "1/7") == 0
    assert contents("parts").keys() > some
    assert encode(*options, "-o", "parts/", "--resume") == 0
    assert contents("parts") == contents("one")


def test_one_part_of_one_is_a_part(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on by itself, and its output is that of a run without parts."""
    write_rows("in.jsonl", 50)
    options = ["in.jsonl", "--shard-size", 20]
    assert encode(*options, "-o", "one/") == 0
    for _ in range(2):
        assert encode(*options, "-o", "part/", "--part", "1/1") == 0
        assert contents("part") == contents("one")
    capsys.readouterr()
    assert encode(*options, "-o", "none/", "--part", "0/3000") == 0
    assert capsys.readouterr().out == "part 3000 of 3000 had nothing to do\n"
    assert not Path("none").exists()


def test_a_part_repairs_what_is_its_own(encode: Encode, tmp_path: Path) -> None:
    write_rows("in.jsonl", 200)
    options = ["in.jsonl", "--shard-size", 20, "-o", "out/"]
    for part in ("1/2", "2/2"):
        assert encode(*options, "--part", part) == 0
    whole = contents("out")
    of_second = Path("out") / next(name for name in sorted(whole) if name.startswith("part-00001"))
    of_second.write_bytes(b"")
    assert encode(*options, "--part", "2/2") == 0
    assert contents("out") == whole


def test_parts_read_their_own_share(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file of lines, of Parquet and of a folder of small files: less than 45 %."""
    write_rows("lines.jsonl", 2000)
    noise = [os.urandom(150).hex() for _ in range(5000)]  # it is not made smaller
    parquet.write_table(pyarrow.table({"text": noise}), "rows.parquet", row_group_size=100)
    Path("many").mkdir()
    for number in range(60):
        write_rows(f"many/{number:02}.jsonl", 30, seed=number)
    read = 0

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            nonlocal read
            count = super().readinto(buffer)
            read += count or 0
            return count or 0

    def counted(path: Path) -> io.BufferedReader:
        return io.BufferedReader(Counted(os.open(path, os.O_RDONLY), closefd=True), 4096)

    monkeypatch.setattr("server.offline.sources.open_regular", counted)
    for name in ("lines.jsonl", "rows.parquet", "many"):
        files = [Path(name)] if Path(name).is_file() else list(Path(name).iterdir())
        size = sum(file.stat().st_size for file in files)
        shares = []
        for part in (1, 2, 3):
            read = 0
            size_of_shards = ["--shard-size", 20]
            assert encode(name, "-o", f"{name}.out/", *size_of_shards, "--part", f"{part}/3") == 0
            shares.append(read / size)
        assert max(shares) < 0.45, (name, shares)
        assert manifest_of(f"{name}.out")["complete"]


def start(model: Path, folder: Path, *options: str, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "server.cli", "encode", *options, "--model", str(model)]
    command += ["--threads", "1", "--runner", f"{RUNNERS}Hashing"]
    path = {"PYTHONPATH": str(ROOT), "FAKE_SECONDS": "0.004"}
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **path, **environment}, stderr=subprocess.PIPE
    )


@pytest.mark.process
def test_three_parts_at_once_one_of_them_killed(
    golden_checkpoint: Path, encode: Encode, tmp_path: Path
) -> None:
    write_rows("in.jsonl", 1500)
    options = ["in.jsonl", "--shard-size", "20", "--id-field", "id", "--format", "jsonl"]
    assert encode(*options, "-o", "one/") == 0
    options += ["-o", "out/", "--device", "cpu"]
    seconds = {1: "0.004", 2: "0.3", 3: "0.004"}  # so slow that it is killed before its end
    parts = [
        start(golden_checkpoint, tmp_path, *options, "--part", f"{n}/3", FAKE_SECONDS=seconds[n])
        for n in (1, 2, 3)
    ]
    ledger = Path("out/.ledger-2-of-3.jsonl")
    while parts[1].poll() is None and (not ledger.exists() or ledger.read_bytes().count(b"\n") < 3):
        time.sleep(0.002)
    parts[1].send_signal(signal.SIGKILL)
    said = [part.communicate(timeout=60)[1].decode() for part in parts]
    assert [part.returncode for part in parts] == [0, -signal.SIGKILL, 0], said
    assert not manifest_of("out").get("complete")
    assert encode(*options, "--part", "2/3") == 0
    assert contents("out") == contents("one")


def test_a_part_that_would_not_belong_is_refused(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows("in.jsonl", 200)
    options = ["in.jsonl", "--shard-size", 20, "-o", "out/"]
    assert encode(*options, "--part", "1/2") == 0
    for changed, what in (
        (["--prompt", "x "], "another prefix:"),
        (["--output-dtype", "int8"], "another output_dtype (float32 then, int8 now):"),
        (["--truncate", "end"], "another truncate (none then, end now):"),
        (["--on-error", "skip"], "another on_error (fail then, skip now):"),
        (["--shard-size", 30], "another shard_size (20 then, 30 now)"),
    ):
        assert encode(*options, *changed, "--part", "2/2") == 1
        assert what in capsys.readouterr().err
    write_rows("in.jsonl", 201)
    assert encode(*options, "--part", "2/2") == 1
    assert "another input.files:" in capsys.readouterr().err
    manifest = manifest_of("out")
    del manifest["layout"]
    Path("out/manifest.json").write_text(json.dumps(manifest))
    assert encode(*options, "--part", "2/2") == 1
    assert "is of an earlier version of this program" in capsys.readouterr().err


class Choosing(Hashing):
    """It finds something by timing, unless it is told. While it does so another part begins: what
    OTHER names becomes the manifest in out/."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        chosen = options.products or {"float32": f"chance {id(self)}"}
        self.info = dataclasses.replace(self.info, products=chosen)
        if not options.products and "OTHER" in os.environ:
            os.rename(os.environ["OTHER"], "out/manifest.json")


def test_a_part_takes_what_another_has_settled_meanwhile(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two begin together, and each finds out by timing who multiplies: the first one's counts."""
    write_rows("in.jsonl", 300)
    options = ["in.jsonl", "--shard-size", 20]
    choosing = f"{__name__}:Choosing"
    assert encode(*options, "-o", "other/", "--part", "1/2", runner=choosing) == 0
    manifest = manifest_of("other")
    manifest["model"]["products"] = {"float32": "chance of another"}
    Path("other.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("OTHER", str(tmp_path / "other.json"))
    assert encode(*options, "-o", "out/", "--part", "2/2", runner=choosing) == 0
    assert manifest_of("out")["model"]["products"] == {"float32": "chance of another"}


def test_parts_and_a_whole_run_do_not_write_at_once(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    write_rows("in.jsonl", 50)
    Path("out").mkdir()
    for kind, refused in ((fcntl.LOCK_SH, []), (fcntl.LOCK_EX, ["--part", "1/2"])):
        with open("out/.manifest.json.lock", "w") as other:
            fcntl.flock(other, kind)
            assert encode("in.jsonl", "-o", "out/", *refused) == 1
            assert "another run is writing out" in capsys.readouterr().err
            if kind == fcntl.LOCK_SH:
                assert encode("in.jsonl", "-o", "out/", "--part", "2/2") == 0
                with open("out/.part-2-of-2.lock", "w") as same:
                    fcntl.flock(same, fcntl.LOCK_EX)
                    assert encode("in.jsonl", "-o", "out/", "--part", "2/2") == 1
                capsys.readouterr()
    assert encode("in.jsonl", "-o", "out/", "--part", "1/2") == 0
    assert not Path("out/.manifest.json.lock").exists()


def left_by_the_killed(folder: Path) -> list[Path]:
    found = [folder / ".nv-embed-2-of-3-x8k2", folder / ".part-2-of-3.lock"]
    found += [folder / ".nv-embed-4-of-9-a_17", folder / ".ledger-2-of-3.jsonl"]
    for path in found:
        path.touch()
    return found


def test_what_killed_parts_have_left_goes_when_all_is_there(encode: Encode, tmp_path: Path) -> None:
    """But not what belongs to one that lives."""
    import fcntl

    write_rows("in.jsonl", 50)
    options = ["in.jsonl", "--shard-size", 20, "-o"]
    assert encode(*options, "one/") == 0
    assert encode(*options, "out/", "--part", "1/2") == 0
    left_by_the_killed(Path("out"))
    living = [Path("out/.part-1-of-7.lock"), Path("out/.nv-embed-1-of-7-q")]
    living[1].touch()
    with living[0].open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert encode(*options, "out/", "--part", "2/2") == 0
        assert contents("out").keys() - contents("one").keys() == {path.name for path in living}
    assert encode(*options, "out/", "--part", "2/2") == 0  # it has ended since
    assert contents("out") == contents("one")


@pytest.mark.parametrize("since", [1, 3])
def test_a_part_that_others_overtake_ends_well(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, since: int
) -> None:
    """Parts of another number do all, and remove every ledger, while it writes."""
    write_rows("in.jsonl", 100)
    options = ["in.jsonl", "--shard-size", 5, "-o"]
    assert encode(*options, "one/") == 0
    usual, count = Ledger.note, 0

    def note(ledger: Ledger, what: Written | SliceEnd) -> None:
        nonlocal count
        usual(ledger, what)
        count += 1
        if count == since:
            for part in ("1/3", "2/3", "3/3"):
                assert encode(*options, "out/", "--part", part) == 0
            assert not ledger.parts.ledger.exists()

    monkeypatch.setattr(Ledger, "note", note)
    assert encode(*options, "out/", "--part", "2/2") == 0
    assert count > since + 5
    assert contents("out") == contents("one")


def test_a_part_waits_for_a_lock_that_is_held_for_a_moment(encode: Encode, tmp_path: Path) -> None:
    """As another part does on its way out."""
    import fcntl

    write_rows("in.jsonl", 5)
    Path("out").mkdir()
    for name in (".manifest.json.lock", ".part-1-of-2.lock"):
        other = (Path("out") / name).open("w")
        fcntl.flock(other, fcntl.LOCK_EX)
        end = threading.Timer(0.1, other.close)
        end.start()
        assert encode("in.jsonl", "-o", "out/", "--part", "1/2") == 0
        end.join()


# ---- inputs


def test_a_folder_of_mixed_kinds_a_pattern_and_several_names(
    encode: Encode, tmp_path: Path, vectors_of: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("in/deep").mkdir(parents=True)
    Path("in/b.txt").write_text("first\nsecond\n")
    Path("in/a.jsonl").write_text('{"text": "third"}\n')
    parquet.write_table(pyarrow.table({"text": ["fourth", "fifth"]}), "in/deep/c.parquet")
    Path("in/README.md").write_text("no text of it\n")
    Path("in/.hidden.txt").write_text("neither\n")
    texts = ["third", "first", "second", "fourth", "fifth"]
    assert encode("in", "-o", "folder.npy") == 0
    assert "in: files of other kinds are left out: in/README.md" in capfd.readouterr().err
    np.testing.assert_array_equal(np.load("folder.npy"), vectors_of(texts))
    assert encode("in/*.[tj]*", "in/deep/c.parquet", "-o", "names.npy") == 0
    np.testing.assert_array_equal(np.load("names.npy"), vectors_of(texts))
    assert encode("in/**/*.parquet", "-o", "deep.npy") == 0
    np.testing.assert_array_equal(np.load("deep.npy"), vectors_of(texts[3:]))
    assert encode("in", "-o", "shards/", "--format", "jsonl") == 0
    manifest = manifest_of("shards")
    assert [file["name"] for file in manifest["input"]["files"]] == [
        "in/a.jsonl",
        "in/b.txt",
        "in/deep/c.parquet",
    ]
    assert manifest["rows_of_inputs"] == [1, 2, 2]
    assert encode("no*.txt", "-o", "none.npy") == 2
    assert "there is no file no*.txt: nothing matches" in capfd.readouterr().err
    assert encode("in", "-o", "in/out/") == 2
    assert "--output in/out lies in in, which is read" in capfd.readouterr().err


def test_urls_are_read_in_ranges(
    encode: Encode, tmp_path: Path, vectors_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    rows = write_rows("in.jsonl", 2500)
    raw = Path("in.jsonl").read_bytes()
    with files.open("/bucket/in.jsonl", "wb") as file:
        file.write(raw)
    monkeypatch.setattr(stores, "_REMOTE_BYTES", 1024)
    fetched = []
    cat_file = type(files).cat_file

    def counting(self: Any, path: str, start: int = 0, end: int = 0, **more: Any) -> bytes:
        fetched.append(end - start)
        return cat_file(self, path, start=start, end=end, **more)

    monkeypatch.setattr(type(files), "cat_file", counting)
    for url in ("memory://bucket/in.jsonl", "memory://bucket/*.jsonl", "memory://bucket"):
        assert encode(url, "-o", "out.npy", "--resume") == 0
        Path("out.npy.manifest.json").unlink()
        np.testing.assert_array_equal(np.load("out.npy"), vectors_of([r["text"] for r in rows]))
    fetched.clear()
    url = "memory://bucket/in.jsonl"
    assert encode(url, "-o", "out/", "--shard-size", 10, "--part", "1/3") == 0
    assert 0 < sum(fetched) < 0.45 * len(raw)
    assert encode(f"file://{tmp_path}/in.jsonl", "-o", "file.npy") == 0
    assert Path("file.npy").read_bytes() == Path("out.npy").read_bytes()


def test_a_store_that_is_not_installed_is_named(
    encode: Encode, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode("gs://bucket/in.jsonl", "-o", "x.npy") == 2
    assert "-m pip install gcsfs" in capsys.readouterr().err
    assert encode("memory://no/such.jsonl", "-o", "x.npy") == 2
    assert "there is no file memory://no/such.jsonl" in capsys.readouterr().err
    assert encode("nope://x/in.jsonl", "-o", "x.npy") == 2
    assert "nope://x/in.jsonl" in capsys.readouterr().err


def test_a_pipe_is_read_once_as_it_comes(
    encode: Encode, tmp_path: Path, vectors_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written to it is embedded before the rest comes, and no copy is made."""
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    texts = [f"line {number}" for number in range(2000)]
    reading, writing = os.pipe()
    half = "".join(f"{text}\n" for text in texts[:1000]).encode()

    def feed() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(half)
            pipe.flush()
            while not list(tmp_path.glob("out/part-*")):
                time.sleep(0.005)
            pipe.write("".join(f"{text}\n" for text in texts[1000:]).encode())

    feeder = threading.Thread(target=feed)
    feeder.start()
    status = encode(f"/dev/fd/{reading}", "-o", "out/", "--shard-size", 200)
    os.close(reading)
    feeder.join(20)
    assert status == 0
    found = np.concatenate([np.load(path) for path in sorted(Path("out").glob("*.npy"))])
    np.testing.assert_array_equal(found, vectors_of(texts))


def test_lines_belong_to_the_slice_of_their_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the cuts fall: before, on and behind the ends of lines, or in a line of many."""
    texts = ["a", "bb", "x" * 40, "ccc", "d", "y" * 9, "e" * 10, "f"]
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts))
    rows, size_of_file = text_rows("text", NONE), (tmp_path / "in.txt").stat().st_size
    for size in range(1, 70):
        monkeypatch.setattr(slices, "SLICE_BYTES_PER_ROW", size)
        found: dict[int, list[str]] = {}
        with inputs.opened([str(tmp_path / "in.txt")]) as sources:
            planned = slices.plan(sources, 1)
            assert len(planned) == -(-size_of_file // size)
            for which in random.Random(size).sample(planned, len(planned)):  # in any order
                chunks = list(chunks_of(which, sources, rows, 100))
                end = chunks.pop()
                found[which.number] = [row.text for chunk in chunks for row in chunk.rows]
                count = len(found[which.number])
                assert end == SliceEnd(which.number, len(chunks), ((count, count),))
        assert [text for number in sorted(found) for text in found[number]] == texts


# ---- what stands beside the vectors, and how they are written


def test_ids_and_columns_are_carried(encode: Encode, tmp_path: Path, vectors_of: Any) -> None:
    rows = [
        {"key": "a", "text": "one", "n": 1, "x": 1, "tags": ["p"], "ok": True, "none": None},
        {"key": "b", "text": "two", "n": 2, "x": 0.5, "tags": {"q": 1}, "ok": None},
        {"key": "c", "text": "three", "n": None, "x": None, "tags": None, "ok": False},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep = ["--id-field", "key", "--keep", "n,x,tags,ok,none"]
    assert encode("in.jsonl", "-o", "out.parquet", *keep) == 0
    table = parquet.read_table("out.parquet")
    kinds = dict(zip(table.schema.names, map(str, table.schema.types), strict=True))
    assert kinds == {
        "index": "int64",
        "key": "string",
        "n": "int64",
        "x": "double",
        "tags": "string",
        "ok": "bool",
        "none": "string",
        "embedding": "fixed_size_list<element: float>[64]",
    }
    found = table.to_pylist()
    assert [row["key"] for row in found] == ["a", "b", "c"]
    assert [row["tags"] for row in found] == ['["p"]', '{"q":1}', None]
    assert [(row["n"], row["x"], row["ok"]) for row in found] == [
        (1, 1.0, True),
        (2, 0.5, None),
        (None, None, False),
    ]
    got = np.stack([row["embedding"] for row in found])
    np.testing.assert_array_equal(got, vectors_of(["one", "two", "three"]))
    assert encode("in.jsonl", "-o", "out.jsonl", *keep) == 0
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["a", "b", "c"]
    assert list(lines[0]) == ["index", "key", "n", "x", "tags", "ok", "none", "embedding"]


def test_columns_of_parquet_keep_their_types(encode: Encode, tmp_path: Path) -> None:
    types = {
        "id": pyarrow.int32(),
        "text": pyarrow.string(),
        "at": pyarrow.timestamp("us", tz="UTC"),
        "tags": pyarrow.list_(pyarrow.string()),
        "score": pyarrow.float32(),
    }
    schema = pyarrow.schema(types)
    rows = [
        {"id": 1, "text": "one", "at": 0, "tags": ["a"], "score": 0.5},
        {"id": 2, "text": "two"},
    ]
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    parquet.write_table(table, "in.parquet")
    options = ["--id-field", "id", "--keep", "at,tags,score"]
    assert encode("in.parquet", "-o", "out.parquet", *options) == 0
    found = parquet.read_table("out.parquet")
    wanted = ["id", "at", "tags", "score"]
    assert found.select(wanted).equals(table.select(wanted))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "in.jsonl, line 2: no id in 'id'"),
        ({"text": "x", "id": "7"}, "in.jsonl, line 2: 'id' is no int64, which the first rows have"),
        ({"text": "x", "id": 1 << 63}, "in.jsonl, line 2: 'id' is no int64"),
        ("x", "in.jsonl, line 2: no object, so there is no field 'id'"),
    ],
)
def test_a_row_without_its_id_is_refused(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, message: str
) -> None:
    head = json.dumps({"id": 1, "text": "a" * 65_500})  # all that tells the types
    Path("in.jsonl").write_text(f"{head}\n{json.dumps(row)}\n")
    assert encode("in.jsonl", "-o", "out.parquet", "--id-field", "id", "--truncate", "end") == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_numbers_of_other_types(
    encode: Encode, tmp_path: Path, vectors_of: Any, dtype: str
) -> None:
    texts = [f"line {number}" for number in range(7)]
    Path("a.txt").write_text("".join(f"{text}\n" for text in texts))
    for output in ("a.npy", "a.jsonl", "a.parquet"):
        assert encode("a.txt", "-o", output, "--output-dtype", dtype, "--shard-size", 3) == 0
    expected = vectors_of(texts)
    scale = int8_scale(64)
    if dtype == "int8":
        expected = np.rint(expected * scale)
    expected = expected.astype(dtype)
    found = np.load("a.npy")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    table = parquet.read_table("a.parquet")
    np.testing.assert_array_equal(np.stack(table["embedding"].to_pylist()), expected)
    assert table.schema.field("embedding").type.value_type == pyarrow.from_numpy_dtype(dtype)
    said = (table.schema.metadata or {}).get(b"int8_scale")
    assert (float(said) if said else None) == (scale if dtype == "int8" else None)
    lines = [json.loads(line)["embedding"] for line in Path("a.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(np.array(lines).astype(dtype), expected)
    manifest = json.loads(Path("a.npy.manifest.json").read_text())
    assert manifest["int8_scale"] == (scale if dtype == "int8" else None)


class Pointed(Hashing):
    """All of each vector is in one number."""

    def row(self, encoding: Encoding) -> np.ndarray:
        row = np.zeros(self.info.width, dtype=np.float32)
        row[0] = 1
        return row


def test_a_vector_that_int8_cannot_hold_is_refused(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("tests.server.runners.WIDTH", 1024)
    Path("a.txt").write_text("one\n")
    runner = f"{__name__}:Pointed"
    monkeypatch.setattr("server.api.vector_format._LEAST_COSINE", 1.1)
    assert encode("a.txt", "--output-dtype", "int8", runner=runner) == 1
    assert "a.txt, line 1: has a vector whose largest numbers int8 cannot hold" in (
        capsys.readouterr().err
    )
    assert encode("a.txt", "--output-dtype", "float16", runner=runner) == 0


@pytest.mark.parametrize(
    ("output", "compression"),
    [
        *((f"a.{end}", None) for end in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")),
        *(("a.parquet", name) for name in ("zstd", "snappy", "gzip", "none")),
    ],
)
def test_compressed_outputs_are_read_as_usual(
    encode: Encode, tmp_path: Path, vectors_of: Any, output: str, compression: str | None
) -> None:
    rows = write_rows("in.jsonl", 50)
    options = ["--compression", compression] if compression else []
    assert encode("in.jsonl", "-o", output, "--shard-size", 7, *options) == 0
    expected = vectors_of([row["text"] for row in rows])
    if output.endswith("parquet"):
        table = parquet.read_table(output)
        got = np.stack(table["embedding"].to_pylist())
        chunk = parquet.ParquetFile(output).metadata.row_group(0).column(1)
        wanted = {"none": "UNCOMPRESSED", None: "SNAPPY"}.get(compression, f"{compression}".upper())
        assert chunk.compression == wanted
    else:
        with pyarrow.input_stream(output) as file:  # by its suffix
            lines = [json.loads(line) for line in file.read().splitlines()]
        got = np.array([line["embedding"] for line in lines], dtype=np.float32)
        assert [line["index"] for line in lines] == list(range(50))
    np.testing.assert_array_equal(got, expected)


def ended_before_the_last_manifest(patch: pytest.MonkeyPatch) -> None:
    as_json = bulk.as_json

    def interrupted(manifest: dict[str, Any]) -> bytes:
        if "complete" in manifest:
            raise KeyboardInterrupt
        return as_json(manifest)

    patch.setattr(bulk, "as_json", interrupted)


@pytest.mark.parametrize("output", ["out.npy", "out.parquet", "out/"])
def test_ended_before_the_last_manifest_nothing_is_computed_again(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    write_rows("in.jsonl", 50)
    options = ["in.jsonl", "-o", output, "--shard-size", 10]
    with monkeypatch.context() as patch:
        ended_before_the_last_manifest(patch)
        assert encode(*options) == 130
    monkeypatch.setenv("FAKE_BATCH_LOG", str(tmp_path / "batches"))
    assert encode(*options, "--resume") == 0
    assert not Path("batches").exists()
    assert not list(tmp_path.glob("*.parts"))
    assert encode(*options, "--resume") == 0


# ---- rows that are refused


BAD = [
    "good one",
    "",
    "word " * 40_000,
    b"caf\xe9",
    "good two",
]


def test_refused_rows_are_skipped_and_listed(
    encode: Encode, tmp_path: Path, vectors_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = [text if isinstance(text, bytes) else text.encode() for text in BAD]
    Path("in").mkdir()
    Path("in/a.txt").write_bytes(b"".join(text + b"\n" for text in raw))
    Path("in/b.jsonl").write_text('{"text": "three"}\n\n{"txt": "x"}\n{"text": "four"}\nsecret {\n')
    options = ["in", "--on-error", "skip", "--shard-size", "3"]
    assert encode(*options, "-o", "out.jsonl") == 0
    assert "4 rows in out.jsonl, 5 more are skipped (out.jsonl.skipped.jsonl)" in (
        capsys.readouterr().out
    )
    skipped = [
        json.loads(line) for line in Path("out.jsonl.skipped.jsonl").read_text().splitlines()
    ]
    assert [(row["file"], row["row"], row["index"]) for row in skipped] == [
        ("in/a.txt", 2, 1),
        ("in/a.txt", 3, 2),
        ("in/a.txt", 4, 3),
        ("in/b.jsonl", 3, 6),
        ("in/b.jsonl", 5, 8),
    ]
    whys = [row["why"] for row in skipped]
    assert whys[0] == "the text is empty"
    assert whys[1].startswith("the input has 40003 tokens")
    assert whys[2].startswith("not UTF-8")
    assert whys[3] == "no field 'text' (--field names it)"
    assert whys[4].startswith("not a line of JSON")
    assert "secret" not in json.dumps(skipped)
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 4, 5, 7]
    got = np.array([line["embedding"] for line in lines], dtype=np.float32)
    np.testing.assert_array_equal(got, vectors_of(["good one", "good two", "three", "four"]))
    manifest = json.loads(Path("out.jsonl.manifest.json").read_text())
    assert (manifest["rows"], manifest["skipped"]) == (4, 5)
    assert encode(*options, "-o", "out.jsonl", "--resume") == 0
    assert "complete already" in capsys.readouterr().out


def test_what_parts_skip_is_what_one_run_skips(encode: Encode, tmp_path: Path) -> None:
    """Numbered by the line in the file, which no part knows by itself."""
    lines = [json.dumps({"text": "" if n % 9 == 4 else f"line {n}"}) for n in range(300)]
    Path("in.jsonl").write_text("\n\n".join(lines) + "\n")
    options = ["in.jsonl", "--shard-size", 5, "--on-error", "skip", "--format", "jsonl"]
    assert encode(*options, "-o", "one/") == 0
    for part in ("0/3", "1/3", "2/3"):  # as one counts who begins at 0
        assert encode(*options, "-o", "parts/", "--part", part) == 0
    assert contents("parts") == contents("one")
    skipped = [json.loads(line) for line in Path("one/skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in skipped] == [2 * n + 1 for n in range(300) if n % 9 == 4]
    # The index is that which a vector in its place would have: between those of its neighbours.
    vectors = [
        json.loads(line)["index"]
        for path in sorted(Path("one").glob("part-*"))
        for line in path.read_text().splitlines()
    ]
    indices = sorted([*vectors, *(row["index"] for row in skipped)])
    assert [n for n, index in enumerate(indices) if index not in set(vectors)] == [
        n for n in range(300) if n % 9 == 4
    ]
    first_of_slices = {n >> 32: n % (1 << 32) for n in reversed(indices)}
    assert len(first_of_slices) > 2
    assert set(first_of_slices.values()) == {0}
    assert encode(*options, "-o", "one/", "--resume") == 0
    for name in ("part-00001-00000.jsonl", ".ledger-refused.jsonl"):
        (Path("one") / name).unlink()
        Path("one/part-00000-00003.jsonl").write_bytes(b"")
        assert encode(*options, "-o", "one/", "--resume") == 0
        assert contents("parts") == contents("one")
    assert b"refused" not in contents("one")["manifest.json"]  # there may be millions


@pytest.mark.parametrize("output", ["out.jsonl", "out/"])
def test_changed_notes_of_refused_rows_are_not_believed(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """Neither a file that is not there, nor another line."""
    Path("in.txt").write_text("".join(f"line {n}\n" if n % 4 else "\n" for n in range(40)))
    options = ["in.txt", "--shard-size", 10, "--on-error", "skip"]
    options += ["--format", "jsonl"] if output == "out/" else []
    assert encode(*options, "-o", f"whole-{output}") == 0
    with monkeypatch.context() as patch:
        ended_before_the_last_manifest(patch)
        assert encode(*options, "-o", output) == 130
    for folder in tmp_path.glob("out*/"):
        for path in folder.glob(".*.jsonl"):
            raw = path.read_bytes()
            changed = raw.replace(b',0,5,"the text', b',7,5,"the text')
            path.write_bytes(changed.replace(b',0,21,"the text', b',0,20,"the text'))
            assert path.name != ".ledger.jsonl" or path.read_bytes() != raw
    assert encode(*options, "-o", output, "--resume") == 0
    if output == "out/":
        assert contents("out") == contents("whole-out")
        return
    for name in (output, f"{output}.skipped.jsonl"):
        assert Path(name).read_bytes() == Path(f"whole-{name}").read_bytes()


def test_a_bad_row_of_a_part_is_named_by_its_byte(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which line of the file it is nobody has counted."""
    lines = [json.dumps({"text": f"line {n}"}) for n in range(100)]
    lines[30] = "{"
    Path("in.jsonl").write_text("\n".join(lines) + "\n")
    assert encode("in.jsonl", "-o", "out/", "--shard-size", 1, "--part", "2/2") == 1
    assert "in.jsonl, line 4 after byte 512: not a line of JSON" in capsys.readouterr().err
    assert encode("in.jsonl", "-o", "one/", "--shard-size", 1) == 1
    assert "in.jsonl, line 31: not a line of JSON" in capsys.readouterr().err


# ---- devices


@pytest.mark.process
def test_two_devices_write_what_one_writes(encode: Encode, tmp_path: Path) -> None:
    """Rows in their order, with their ids, whoever was quicker."""
    write_rows("in.jsonl", 400)
    options = ["in.jsonl", "--shard-size", 20, "--threads", 1, "--id-field", "id"]
    assert encode(*options, "-o", "one.parquet") == 0
    assert encode(*options, "-o", "two.parquet", "--devices", "cpu,cpu") == 0
    assert Path("two.parquet").read_bytes() == Path("one.parquet").read_bytes()


@pytest.mark.process
def test_a_device_that_is_not_there_is_one_line(
    golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one\n")
    model = ["--model", str(golden_checkpoint), "--dtype", "float32"]
    assert cli.main(["encode", "a.txt", "-o", "out/", "--devices", "cpu,cuda:4000", *model]) == 2
    said = capfd.readouterr().err
    assert "cuda:4000: " in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.process
def test_what_fails_on_a_device_ends_the_run_and_what_is_done_stays(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows("in.jsonl", 60)
    rows[50]["text"] = "word " * 40_000
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["in.jsonl", "-o", "out.npy", "--shard-size", 5, "--devices", "cpu,cpu"]
    assert encode(*options) == 1
    said = capsys.readouterr().err
    assert "in.jsonl, line 51: the input has 40003 tokens" in said
    assert said.count("\n") == 1
    assert Path("out.npy.parts/.joined").stat().st_size > 0


@pytest.mark.process
def test_what_a_device_failed_with_is_said_by_a_send_that_comes_too_late(
    encode: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever is dealt the first shard ends before it is dealt another."""
    rows = write_rows("in.jsonl", 60)
    rows[0]["text"] = "word " * 40_000
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    send, failing = crew._Member.send, []

    def send_late(member: crew._Member, what: object) -> None:
        if member in failing:
            member.process.join(30)
            assert member.process.exitcode == 0
        if isinstance(what, crew.Task) and what.first_index == 0:
            failing.append(member)
        send(member, what)

    monkeypatch.setattr(crew._Member, "send", send_late)
    options = ["in.jsonl", "-o", "out.npy", "--shard-size", 5, "--devices", "cpu,cpu"]
    assert encode(*options) == 1
    assert "in.jsonl, line 1: the input has 40003 tokens" in capsys.readouterr().err
    assert failing


# ---- another engine


def test_slices_that_others_write_in_any_order_are_one_run(
    encode: Encode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine does whose workers get the recipe, a slice and what is known to be there."""
    rows = write_rows("in.jsonl", 500)
    rows[77]["text"] = ""
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["in.jsonl", "--shard-size", 20, "--format", "parquet", "--id-field", "id"]
    options += ["--on-error", "skip"]
    assert encode(*options, "-o", "one/") == 0
    assert encode(*options, "-o", "other/", "--part", "2/5") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("other").glob("part-*")}

    def write(recipe: Recipe, todo: bulk.Run[Any], _: object) -> None:
        sent = pickle.loads(pickle.dumps(recipe))  # noqa: S301
        encoder = sent.encoder("cpu")
        todo.begin(encoder.runner.info, sent.vectors(encoder.runner.info))
        writer, job = sent.writer(encoder, todo.run), sent.job

        def slices_of(
            plan: Sequence[slices.Slice], _: Sequence[Input], ledger: Ledger
        ) -> Iterator[Written | SliceEnd]:
            known = pickle.loads(pickle.dumps(ledger))  # noqa: S301
            for which in random.Random(3).sample(plan, len(plan)):
                with inputs.opened(sent.arguments.file) as sources:
                    rows = call.rows_of(sent.arguments, job)
                    yield from writer.write_slice(which, sources, rows, job, known.has)

        todo.finish_slices(slices_of)

    monkeypatch.setattr("server.offline.encode._write", write)
    assert encode(*options, "-o", "other/", "--resume") == 0
    assert contents("other") == contents("one")
    assert {path: path.stat().st_mtime_ns for path in before} == before
