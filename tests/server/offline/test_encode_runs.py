"""`nv-embed encode` as a run: its place, what it trusts, what it leaves behind, how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import progress
from model.batch import BatchLimits, Encoding, RunnerOptions
from model.encoder import Encoder
from model.linear.packed_linear import PackedLinear
from model.platform import products
from model.platform.products import Candidate
from model.progress import Progress
from model.tokenizer import NVEmbedTokenizer
from model.user_files import LockedError, locked
from server import cli
from server.offline import bulk, shards, sources
from tests.server.offline.conftest import Encode
from tests.server.runners import Hashing, vector_of

pytestmark = pytest.mark.whole

LINES = [f"line {number}" for number in range(10)]


@pytest.fixture
def encode(encode: Encode, tmp_path: Path) -> Encode:
    """With a file to embed."""
    (tmp_path / "a.txt").write_text("\n".join(LINES) + "\n")
    return encode


@pytest.fixture
def expected(golden_checkpoint: Path) -> np.ndarray:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    return np.stack([vector_of(tokenizer.encode(line, max_tokens=99).ids) for line in LINES])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Interrupting(Hashing):
    """A signal comes in its third batch: FAKE_SIGNAL, or that of Ctrl-C."""

    batches = 0

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        type(self).batches += 1
        if type(self).batches == 3:
            number = int(os.environ.get("FAKE_SIGNAL", signal.SIGINT))
            os.kill(os.getpid(), number)
            time.sleep(1)
        return super().embed(encodings)


@pytest.fixture
def interrupting(signals_as_usual: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Interrupting, "batches", 0)
    return f"{__name__}:Interrupting"


# ---- what the output may be called


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "/dev/null"], "is a device: vectors need a file, or a folder"),
        (["-o", "-"], "name a file, or a folder for shards"),
        (["-o", ""], "-o: "),
        (["-o", ".npy"], "a suffix without a name"),
        (["-o", "a.txt/"], "a.txt/ is a file, not a folder"),
        (["-o", "runs.v2"], "write to .npy, .jsonl, .parquet, or to a folder (with a / behind)"),
        (["-o", "x.npy", "--format", "jsonl"], "--format jsonl contradicts --output x.npy"),
        (["--field", "body"], "--field is for JSON lines and Parquet, and a.txt is text"),
        (["--openai-batch", "-o", "x.jsonl.gz"], "does not compress: name it x.jsonl"),
        (["--openai-batch", "-o", "x.jsonl.zst"], "does not compress: name it x.jsonl"),
        (["--openai-batch"], "--openai-batch reads JSON lines, and a.txt is text"),
        (["--openai-batch", "--task", "NQ"], "--task and --openai-batch: each request says its"),
        (["--openai-batch", "--field", "x"], "--field and --openai-batch"),
        (["--prompt", "\udcff"], "the prefix is not UTF-8"),
        (["--shard-size", "0"], "--shard-size: must be at least 1, not 0"),
        (["--shard-size", "-1"], "--shard-size: must be at least 1, not -1"),
        (["--threads", "-1"], "--threads"),
        (["--threads", "0"], "--threads"),
        (["--max-batch-tokens", "0"], "--max-batch-tokens"),
    ],
)
def test_a_wrong_call_is_one_line_and_leaves_nothing(
    encode: Encode,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert encode("a.txt", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert left(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t*.txt", "name the --output: only that of one local file has a default"),
        ("no\0name", "cannot be read: embedded null byte"),
        ("a.txt/b", "cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("fifo", "fifo is a pipe (FIFO), not a file"),
        ("/dev/null", "name the --output"),
        ("..", "name the --output: only that of one local file has a default"),
    ],
)
def test_a_wrong_input_is_one_line(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert encode(name) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("output", ["runs.v2/", "there.v2", "OUT.NPY"])
def test_a_slash_a_folder_and_capitals_are_understood(
    encode: Encode, tmp_path: Path, expected: np.ndarray, output: str
) -> None:
    (tmp_path / "there.v2").mkdir()
    assert encode("a.txt", "-o", output) == 0
    written = tmp_path / output
    file = written / "part-00000-00000.npy" if written.is_dir() else written
    np.testing.assert_array_equal(np.load(file), expected)


def test_names_that_are_not_utf8_are_names(
    encode: Encode, tmp_path: Path, expected: np.ndarray
) -> None:
    (tmp_path / "a.txt").rename(tmp_path / "caf\udce9.txt")
    assert encode("caf\udce9.txt") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "caf\udce9.npy"), expected)
    assert encode("caf\udce9.txt", "--resume") == 0


def test_the_input_is_never_overwritten(encode: Encode, tmp_path: Path) -> None:
    for name in ("b.npy.manifest.json", "c.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
        assert encode(name, "-o", "b.npy" if name.startswith("b") else "c.jsonl") == 2
        assert (tmp_path / name).read_text() == '{"text": "x"}\n'


@pytest.mark.parametrize("link", [os.symlink, os.link, None])
@pytest.mark.parametrize("through_a_pipe", [False, True])
def test_the_input_under_another_name_is_not_overwritten(
    encode: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    link: Callable[[Path, Path], None] | None,
    through_a_pipe: bool,
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"text": "x"}\n')
    if link:
        link(source, output)
    else:
        output = tmp_path / "." / "in.jsonl"
    if through_a_pipe:
        with source.open("rb") as file, monkeypatch.context() as redirected:
            redirected.setattr(sources, "_STREAMS", re.compile(rf"/dev/fd/({file.fileno()})|-"))
            redirected.setattr(sources, "is_stream", lambda name: True)
            assert encode(f"/dev/fd/{file.fileno()}", "-o", str(output)) == 2
    else:
        assert encode("in.jsonl", "-o", str(output)) == 2
    assert source.read_text() == '{"text": "x"}\n'


def test_an_input_among_the_shards_is_kept(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.npy.parts").mkdir()
    source = tmp_path / "x.npy.parts" / "part-00000-00000.jsonl"
    source.write_text('{"text": "x"}\n')
    assert encode(str(source), "-o", "x.npy") == 2
    assert "lies in" in capsys.readouterr().err
    assert source.exists()


# ---- whose files these are


@pytest.fixture
def folder_in(tmp_path: Path) -> None:
    """A folder of one text, and a link to it."""
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("a\n")
    (tmp_path / "in/b.npy.txt").write_text("b\n")
    (tmp_path / "link").symlink_to("in")


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("in", "in/new.npy"),
        ("in", "in/leads-elsewhere.npy"),
        ("link", "in/deep/out.npy"),
        ("in/../in", "link/out/"),
        ("file://{}/in", "in/out/"),
        ("file://{}/in/", "link/out/"),
        ("local://{}/link/../in/deep/..", "in/../in/out/"),
    ],
)
@pytest.mark.usefixtures("folder_in")
def test_an_output_within_a_folder_that_is_read_is_refused(
    encode: Encode, tmp_path: Path, name: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """However either of them is called; a link in its place would be replaced."""
    (tmp_path / "in/leads-elsewhere.npy").symlink_to(tmp_path / "elsewhere.npy")
    assert encode("a.txt", name.format(tmp_path), "-o", output) == 2
    assert "which is read: name one outside of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        ("in/**/*.[nt]*", "in/out/"),
        ("in/**", "in/out.npy"),
        ("in/[!z]*", "in/out.npy"),
        ("link/*.npy*", "in/out.npy"),
        ("file://{}/in/**/*[.t]*", "link/out/"),
        ("in/*/[ps]*", "in/out/"),
    ],
)
@pytest.mark.usefixtures("folder_in")
def test_an_output_that_a_pattern_would_match_is_refused(
    encode: Encode, tmp_path: Path, pattern: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next part would take it for an input."""
    (tmp_path / "in/deep/source.txt").write_text("c\n")
    name = pattern.format(tmp_path)
    assert encode("a.txt", name, "-o", output) == 2
    assert f"{name} would match" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pattern", "output"),
    [
        ("in/*.txt", "in/out.npy"),
        ("in/*.[nt]*", "in/out/"),
        ("in/**/*.[nt]*", "in/.out/"),
        ("in/**/*.txt", "in/out/"),
    ],
)
@pytest.mark.usefixtures("folder_in")
def test_an_output_that_a_pattern_would_not_match_is_written(
    encode: Encode, pattern: str, output: str
) -> None:
    assert encode(pattern, "-o", output) == 0
    assert encode(pattern, "-o", output, "--resume") == 0


@pytest.mark.parametrize(("given", "wanted"), [(0o600, 0o600), (0o640, 0o640), (0o444, 0o644)])
@pytest.mark.parametrize("output", ["out.npy", "out.jsonl", "shards/"])
def test_outputs_have_the_permissions_of_the_input(
    encode: Encode, tmp_path: Path, given: int, wanted: int, output: str
) -> None:
    (tmp_path / "a.txt").chmod(given)
    assert encode("a.txt", "-o", output) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.txt"]
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {wanted}


def test_links_at_names_that_can_be_guessed_are_not_followed(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".out.npy.tmp", "out.npy", "out.npy.manifest.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(victim)
        if name.endswith("json"):  # what is there is no manifest
            assert encode("a.txt", "-o", "out.npy") == 1
        else:
            assert encode("a.txt", "-o", "out.npy") == 0
        assert victim.read_text() == "mine"
    (tmp_path / "out.npy.manifest.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.npy.parts").symlink_to(tmp_path / "elsewhere")
    assert encode("a.txt", "-o", "out.npy") == 1
    assert "out.npy.parts is a symbolic link" in capsys.readouterr().err
    (tmp_path / ".other.npy.manifest.json.lock").symlink_to(victim)
    assert encode("a.txt", "-o", "other.npy") == 1
    assert victim.read_text() == "mine"
    assert left(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("name", ["out.npy.manifest.json", "out.npy.parts/.ledger.jsonl"])
def test_no_run_waits_for_a_pipe_in_a_files_place(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "out.npy.parts").mkdir()
    (tmp_path / "out.npy.parts" / "part-00000-00000.npy").touch()  # as of a run that has begun
    os.mkfifo(tmp_path / name)
    with _within(20):
        status = encode("a.txt", "-o", "out.npy", "--resume")
    if name.endswith("manifest.json"):
        assert status == 1
        assert "is not a manifest" in capsys.readouterr().err
    else:
        assert status == 0


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def late(signum: int, frame: object) -> None:
        raise AssertionError(f"waited for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_foreign_files_in_the_way_are_left_alone(encode: Encode, tmp_path: Path) -> None:
    (tmp_path / "out.npy.parts").mkdir()
    (tmp_path / "out.npy.parts" / "diary.txt").write_text("mine")
    assert encode("a.txt", "-o", "out.npy") == 0
    assert (tmp_path / "out.npy.parts" / "diary.txt").read_text() == "mine"
    assert left(tmp_path / "out.npy.parts") == ["diary.txt"]


# ---- one run an output


@pytest.mark.parametrize("output", ["out.npy", "shards/"])
def test_a_second_run_is_refused(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    job_lock = ".out.npy.manifest.json.lock"
    if output == "shards/":
        (tmp_path / "shards").mkdir()
        job_lock = "shards/.manifest.json.lock"
    with (tmp_path / job_lock).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for options in ((), ("--resume",)):
            assert encode("a.txt", "-o", output, *options) == 1
            said = capsys.readouterr().err
            assert "another run is writing" in said
            assert said.count("\n") == 1
    # The lock went with its holder; that its file is still there means nothing.
    assert encode("a.txt", "-o", output) == 0
    assert not (tmp_path / job_lock).exists()


def test_many_runs_at_once_take_turns_or_refuse(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Threads that begin together: never two inside, and none that waits for ever."""
    target, inside, most, refused = tmp_path / "a.npy", 0, 0, 0
    lock = tmp_path / ".lock"

    def run() -> None:
        nonlocal inside, most, refused
        for _ in range(50):
            try:
                with locked(lock, target):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.0005)
                    inside -= 1
            except LockedError:
                refused += 1

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == 1
    assert 0 < refused < 200
    assert not lock.exists()


# ---- state


def test_a_start_that_fails_leaves_nothing(
    encode: Encode, tmp_path: Path, golden_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("out.npy", "shards/"):
        assert encode("a.txt", "-o", output, runner="tests.server.runners:Refusing") == 2
        model = ["--model", str(golden_checkpoint), "--device", "cpu"]
        assert cli.main(["encode", "a.txt", "-o", output, "--dtype", "fp16", *model]) == 2
    assert left(tmp_path) == ["a.txt"]
    capsys.readouterr()
    for output in ("out.npy", "shards/"):
        assert encode("a.txt", "-o", output) == 0
        assert capsys.readouterr().err == ""


def test_a_row_that_fails_first_leaves_nothing(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long.txt").write_text("word " * 40_000)
    for output in ("long.npy", "shards/"):
        assert encode("long.txt", "-o", output) == 1
        assert "long.txt, line 1: the input has 40003 tokens" in capsys.readouterr().err
        assert left(tmp_path) == ["a.txt", "long.txt"]
        assert encode("long.txt", "-o", output, "--truncate", "end") == 0
        for path in sorted(tmp_path.rglob("*long.npy*")):
            path.unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_within_a_shard_keeps_the_batches_that_are_done(
    encode: Encode,
    tmp_path: Path,
    expected: np.ndarray,
    interrupting: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("FAKE_SIGNAL", str(int(number)))
    handler = signal.getsignal(signal.SIGTERM)
    options = ("a.txt", "-o", "out.npy", "--max-batch-tokens", "12")  # two texts a batch
    assert encode(*options, runner=interrupting) == 128 + number
    said = capsys.readouterr().err
    assert said == (
        "nv-embed encode: interrupted; 4 rows are kept; the same command with --resume goes on\n"
    )
    assert signal.getsignal(signal.SIGTERM) == handler
    assert encode(*options) == 1  # not over what is kept
    assert "go on with --resume, or remove out.npy.manifest.json" in capsys.readouterr().err
    log = tmp_path / "batches"
    monkeypatch.setenv("FAKE_BATCH_LOG", str(log))
    assert encode(*options, "--resume") == 0
    assert len(log.read_text().splitlines()) == 3  # of five
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)
    log.unlink()
    assert left(tmp_path) == ["a.txt", "out.npy", "out.npy.manifest.json"]


def test_nohup_is_respected(
    encode: Encode, tmp_path: Path, expected: np.ndarray, interrupting: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FAKE_SIGNAL", str(int(signal.SIGHUP)))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        options = ("a.txt", "--max-batch-tokens", "12")
        assert encode(*options, runner=interrupting) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)


@pytest.mark.parametrize("harm", ["truncate", "empty", "swap", "garbage"])
def test_kept_batches_are_believed_only_when_whole(
    encode: Encode, tmp_path: Path, expected: np.ndarray, interrupting: str, harm: str
) -> None:
    options = ("a.txt", "-o", "out.npy", "--max-batch-tokens", "12")
    assert encode(*options, runner=interrupting) == 130
    kept = tmp_path / "out.npy.parts" / ".part-00000-00000.kept"
    raw = bytearray(kept.read_bytes())
    if harm == "truncate":
        raw = raw[:-5]
    elif harm == "empty":
        raw.clear()
    elif harm == "swap":
        raw[-1] ^= 255
    else:
        raw[:40] = os.urandom(40)
    kept.write_bytes(raw)
    assert encode(*options, "--resume") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


@pytest.mark.parametrize(
    ("suffix", "harm"),
    [
        *(("npy", harm) for harm in ("truncated", "emptied", "gone", "other")),
        ("jsonl", "truncated"),
        ("parquet", "emptied"),
    ],
)
def test_shards_are_believed_only_when_proven(
    encode: Encode, tmp_path: Path, suffix: str, harm: str
) -> None:
    """Of a folder that was complete, and of one that an unfinished run left."""
    options = ("a.txt", "-o", "shards/", "--format", suffix, "--shard-size", "3", "--resume")
    assert encode(*options) == 0
    folder = tmp_path / "shards"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(whole) == 5
    for number, finished in ((1, True), (3, True), (0, False)):
        if not finished:
            manifest = json.loads(whole["manifest.json"])
            del manifest["complete"]
            (folder / "manifest.json").write_text(json.dumps(manifest))
        shard = folder / f"part-00000-0000{number}.{suffix}"
        raw = shard.read_bytes()
        if harm == "gone":
            shard.unlink()
        elif harm == "other":  # a whole shard, but not this one
            shard.write_bytes(whole[f"part-00000-0000{(number + 1) % 3}.{suffix}"])
        else:
            shard.write_bytes(raw[: len(raw) // 2] if harm == "truncated" else b"")
        assert encode(*options) == 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_an_output_that_was_changed_is_made_anew(
    encode: Encode, tmp_path: Path, expected: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    assert encode("a.txt") == 0
    output = tmp_path / "a.npy"
    whole = output.read_bytes()
    for raw in (whole[:-100], b"", whole[:-4] + b"abcd"):
        output.write_bytes(raw)
        assert encode("a.txt", "--resume") == 0
        assert output.read_bytes() == whole
    capfd.readouterr()
    assert encode("a.txt", "--resume") == 0
    assert "10 rows in a.npy (complete already)" in capfd.readouterr().out
    output.unlink()
    assert encode("a.txt", "--resume") == 0
    assert "was complete and is gone; to make it anew, remove" in capfd.readouterr().err


def test_shards_without_their_manifest_are_not_mixed_in(encode: Encode, tmp_path: Path) -> None:
    """As when the manifest was removed, as a message had said, and --resume given all the same."""
    options = ("a.txt", "-o", "out.npy", "--shard-size", "3")
    assert encode(*options) == 0
    whole = (tmp_path / "out.npy").read_bytes()
    parts = tmp_path / "out.npy.parts"
    parts.mkdir()
    np.save(parts / "part-00000-00000.npy", np.ones((3, 64), dtype=np.float32))
    (tmp_path / "out.npy.manifest.json").unlink()
    assert encode(*options, "--resume") == 0
    assert (tmp_path / "out.npy").read_bytes() == whole


@pytest.mark.parametrize("changed", ["shrinks", "grows", "same length", "middle"])
def test_an_input_that_changes_between_its_readings_is_refused(
    encode: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: str,
) -> None:
    file = tmp_path / "a.txt"
    contents = {
        "shrinks": "\n".join(LINES[:4]) + "\n",
        "grows": "\n".join([*LINES, "more"]) + "\n",
        "same length": file.read_text().replace("line 9", "lime 9"),
        "middle": file.read_text().replace("line 4", "lime 4"),
    }
    begin = bulk.Run.begin

    def change_and_begin(self: bulk.Run[Any], info: Any, vectors: str) -> None:
        file.write_text(contents[changed])
        begin(self, info, vectors)

    monkeypatch.setattr(bulk.Run, "begin", change_and_begin)
    assert encode("a.txt", "--shard-size", "3") == 1
    assert "a.txt changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "a.npy").exists()


class Rounding(PackedLinear):
    """As right as torch's product, with other last bits."""

    compiles_rows = False

    def forward(self, x: Tensor) -> Tensor:
        return (x.double() @ self.weight.double().T).to(x.dtype)

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return weight.clone()


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_run_goes_on_with_what_was_chosen_by_timing(
    golden_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    """The next process may find another product, or another dtype, the fastest."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("".join(f"some words of line {number}\n" for number in range(40)))
    choices = (products._TORCH, Candidate("rounding", Rounding))
    monkeypatch.setattr(
        products, "CANDIDATES", {**products.CANDIDATES, "float32": choices, "bfloat16": choices}
    )
    monkeypatch.setattr(products, "_DROPPED", math.inf)  # the place decides, not this machine

    def encode(place: int, output: str, *options: str) -> int:
        products._probe.cache_clear()
        monkeypatch.setattr(
            products, "_fastest", lambda attempts: attempts[min(place, len(attempts) - 1)]
        )
        fastest = torch.bfloat16 if place else torch.float32
        monkeypatch.setattr(products, "fastest_dtype", lambda *_: fastest)
        model = ("--model", str(golden_checkpoint), "--device", "cpu", "--dtype", dtype)
        texts = ("a.txt", "-o", output, "--shard-size", "20")
        return cli.main(["encode", *texts, *model, *options])

    assert encode(0, "first.npy") == 0
    assert encode(1, "second.npy") == 0
    first, second = Path("first.npy").read_bytes(), Path("second.npy").read_bytes()
    assert first != second

    encode(0, "a/")
    begun = json.loads(Path("a/manifest.json").read_text())
    manifest = {name: begun[name] for name in begun if name not in ("complete", "files")}
    Path("a/manifest.json").write_text(json.dumps(manifest))
    Path("a/part-00000-00001.npy").unlink()
    assert encode(1, "a/", "--resume") == 0
    np.testing.assert_array_equal(
        np.concatenate([np.load(f"a/part-00000-0000{number}.npy") for number in (0, 1)]),
        np.load("first.npy"),
    )

    manifest["model"]["products"] = {"float32": "of another machine"}
    Path("a/manifest.json").write_text(json.dumps(manifest))
    Path("a/part-00000-00001.npy").unlink()
    capsys.readouterr()
    assert encode(0, "a/", "--resume") == 1
    said = capsys.readouterr().err
    assert "a/manifest.json cannot be gone on with here: float32 by of another machine, " in said
    assert "use the machine that it was begun on, or remove a to begin anew\n" in said
    products._probe.cache_clear()


def test_what_settles_at_the_start_is_in_the_manifest_and_counts(
    encode: Encode, golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["encode", "a.txt", "--model", str(golden_checkpoint), "--device", "cpu"]
    assert cli.main(options) == 0
    path = tmp_path / "a.npy.manifest.json"
    manifest = json.loads(path.read_text())
    expected = {
        "quantization": "none",
        "attention": "sdpa",
        "fused_kernels": "plain",
        "device": "cpu",
    }
    assert manifest["model"].items() >= expected.items()
    assert manifest["model"]["dtype"] in ("float32", "bfloat16")
    other = {"float32": "bfloat16", "bfloat16": "float32"}[manifest["model"]["dtype"]]
    assert cli.main([*options, "--resume"]) == 0  # auto, and complete: no model is loaded
    assert cli.main([*options, "--resume", "--dtype", other]) == 1
    assert f"another model.dtype ({manifest['model']['dtype']} then, {other} now)" in (
        capsys.readouterr().err
    )
    # As another machine would have left it, where auto means something else.
    for name, then in (
        ("device", "cuda"),
        ("attention", "varlen"),
        ("fused_kernels", "triton"),
    ):
        unfinished = {k: v for k, v in manifest.items() if k not in ("complete", "files")}
        unfinished["model"] = {**manifest["model"], name: then}
        path.write_text(json.dumps(unfinished))
        (tmp_path / "a.npy.parts").mkdir(exist_ok=True)
        (tmp_path / "a.npy.parts" / "part-00000-00000.npy").write_bytes(b"")
        assert cli.main([*options, "--resume"]) == 1
        said = capsys.readouterr().err
        assert f"another model.{name} ({then} then, {manifest['model'][name]} now)" in said
        assert "remove a.npy.manifest.json to begin anew" in said
    path.unlink()  # as the message says
    assert cli.main(options) == 0


# ---- the system refuses


def test_a_full_disk_is_one_line_and_resume_is_right(
    encode: Encode,
    tmp_path: Path,
    expected: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = ("a.txt", "-o", "out.npy", "--shard-size", "5")
    try:  # room for shards of 1,408 bytes and the manifest, not for the whole
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        assert encode(*options) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "out.npy: no more may be written (File too large): make room" in said
    assert "--resume goes on" in said
    assert left(tmp_path) == ["a.txt", "out.npy.manifest.json", "out.npy.parts"]
    assert not list((tmp_path / "out.npy.parts").glob(".nv-embed-*"))
    log = tmp_path / "batches"
    monkeypatch.setenv("FAKE_BATCH_LOG", str(log))
    assert encode(*options, "--resume") == 0
    assert not log.exists()  # nothing was computed again
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_no_room_at_all_leaves_nothing(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for output in ("out.npy", "shards/"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
            assert encode("a.txt", "-o", output) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "no more may be written" in capsys.readouterr().err
        assert left(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("output", ["/proc/x.npy", "/proc/x/", "/sys/x.npy", "y" * 252 + ".npy"])
def test_places_that_cannot_be_written_are_one_line(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    assert encode("a.txt", "-o", output) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said
    assert left(tmp_path) == ["a.txt"]


class Vanishing(Hashing):
    """The folder of the shards goes away while it embeds."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        import shutil

        shutil.rmtree("gone", ignore_errors=True)
        return super().embed(encodings)


def test_a_folder_that_vanishes_is_one_line(
    encode: Encode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    assert encode("a.txt", "-o", "gone/x.npy", runner=f"{__name__}:Vanishing") == 1
    said = capsys.readouterr().err
    assert "No such file or directory" in said
    assert said.count("\n") == 1


class Losing(Hashing):
    """What the run has written goes away while it embeds: the files that FAKE_LOST matches."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        for path in Path("out").glob(os.environ["FAKE_LOST"]):
            path.unlink()
        return super().embed(encodings)


@pytest.mark.parametrize("lost", ["part-*", ".ledger*", "part-*0.npy"])
def test_a_run_whose_shards_go_away_does_not_say_that_it_is_done(
    encode: Encode,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{line}\n\n" for line in LINES))
    options = ["a.txt", "--shard-size", "4", "--on-error", "skip"]
    assert encode(*options, "-o", "whole/") == 0
    monkeypatch.setenv("FAKE_LOST", lost)
    status = encode(*options, "-o", "out/", runner=f"{__name__}:Losing")
    if status:
        assert "--resume goes on" in capsys.readouterr().err
        assert encode(*options, "-o", "out/", "--resume") == 0
    out, whole = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("out", "whole")
    )
    assert out == whole


def test_little_memory_halves_batches_and_names_a_text_that_never_fits(
    encode: Encode, tmp_path: Path, expected: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = "tests.server.runners:Cramped"  # 64 tokens at once
    (tmp_path / "a.txt").write_text("\n".join(LINES * 5))
    assert encode("a.txt", runner=runner) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), np.tile(expected, (5, 1)))
    (tmp_path / "b.txt").write_text("short\n" + "word " * 100)
    assert encode("b.txt", runner=runner) == 1
    assert "b.txt, line 2: the text does not fit into the device's memory" in (
        capsys.readouterr().err
    )


class Exhausted(Hashing):
    """No memory at all, outside of any forward."""

    def __init__(self, options: RunnerOptions) -> None:
        raise MemoryError


def test_no_memory_is_one_line(encode: Encode, capsys: pytest.CaptureFixture[str]) -> None:
    assert encode("a.txt", runner=f"{__name__}:Exhausted") == 1
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert said.count("\n") == 1


# ---- progress, sizes


def test_progress_moves_with_each_batch(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, encode: Encode
) -> None:
    seen: list[int] = []
    reach = Progress.reach

    def note(self: Progress, row: int) -> None:
        seen.append(row)
        reach(self, row)

    monkeypatch.setattr(Progress, "reach", note)
    assert encode("a.txt", "--max-batch-tokens", "12") == 0
    assert seen[:5] == [2, 4, 6, 8, 10]


def test_a_log_tells_how_far_it_is(
    encode: Encode, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_SAY_EVERY_S", 0.0)
    assert encode("a.txt", "--max-batch-tokens", "12") == 0
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 5
    for line, rows in zip(said, (2, 4, 6, 8, 10), strict=True):
        found = rf"Embedding: {rows} of 10 rows, \d+\.\d rows/s, about \d+ s left$"
        assert re.search(found, line), line


def test_a_terminal_sees_each_batch_and_earlier_rows_have_no_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(1000) as progress:
        progress.skip_to(900)
        time.sleep(0.2)
        progress.reach(902)
    shown = terminal.getvalue().split("\r")[-1]
    assert "902/1000" in shown
    assert 0 < float(re.search(r"([\d.]+) rows/s", shown)[1]) <= 10  # type: ignore[index]


def test_long_rows_make_short_shards(encode: Encode, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1000)
    monkeypatch.setattr(shards, "_ROW_BYTES", 1)
    (tmp_path / "a.txt").write_text("\n".join(["x" * 400] * 5 + ["y"] * 3))
    assert encode("a.txt", "-o", "shards/", "--shard-size", "500") == 0
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert [file["rows"] for file in manifest["files"]] == [2, 2, 4]
    rows = [len(np.load(tmp_path / "shards" / file["name"])) for file in manifest["files"]]
    assert rows == [2, 2, 4]


def test_which_texts_share_a_batch_does_not_depend_on_what_is_done(
    golden_checkpoint: Path,
) -> None:
    runner = Hashing(RunnerOptions(path=""))
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    encoder = Encoder.of(tokenizer, runner, BatchLimits(40, 8), max_tokens=99)
    encodings = [tokenizer.encode("w " * (7 * n % 13 + 1), max_tokens=99) for n in range(30)]
    whole = [batch.indices for batch in encoder.batches(encodings)]
    for count in range(len(whole) + 1):
        done = {index for batch in whole[:count] for index in batch}
        assert [b.indices for b in encoder.batches(encodings, done)] == whole[count:]
        half = done - {whole[0][0]}  # a batch that is done in part is done again, whole
        again = [b.indices for b in encoder.batches(encodings, half)]
        assert again == (whole[:1] if count else []) + whole[count:]


# ---- batch files


def batch_line(custom_id: str = "a", **body: object) -> dict[str, object]:
    body = {"model": "golden-embed", "input": "line 0", **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body}


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


def test_dimensions_in_a_batch_file_are_refused_in_the_words_of_http(
    encode: Encode, tmp_path: Path, expected: np.ndarray
) -> None:
    lines = [batch_line(dimensions=64), batch_line(dimensions=32), batch_line(dimensions=65)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert encode("b.jsonl", "--openai-batch") == 0
    got = answers(tmp_path / "b.answers.jsonl")
    assert [answer["status_code"] for answer in got] == [200, 400, 400]
    np.testing.assert_allclose(got[0]["body"]["data"][0]["embedding"], expected[0], atol=1e-7)
    assert got[1]["body"]["error"]["message"] == (
        "This model has 64 dimensions, 32 cannot be had (the server was started without "
        "--allow-truncated-dimensions)"
    )
    assert got[2]["body"]["error"]["message"] == "This model has 64 dimensions, 65 cannot be had"


def test_one_bad_request_of_a_batch_file_is_its_own_error(
    encode: Encode, tmp_path: Path, expected: np.ndarray
) -> None:
    """No JSON object, NaN in a field that is not read and in one that is, no memory; half of a
    surrogate pair is none."""
    bodies = [
        json.dumps(batch_line("a")),
        json.dumps(batch_line("b", input="cut \ud83d")),
        json.dumps({**batch_line("c"), "body": [1]}),
        json.dumps({k: v for k, v in batch_line("d").items() if k != "body"}),
        json.dumps(batch_line("e", user=float("nan"))),
        json.dumps(batch_line("f", input=["line 1", "word " * 100])),
        json.dumps(batch_line("g", input=["line 2", "line 3"])),
        json.dumps(batch_line("h", dimensions=float("nan"))),
    ]
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\n".join(bodies) + "\n\n", encoding="utf-8")
    runner = "tests.server.runners:Cramped"
    assert encode("b.jsonl", "--openai-batch", "-o", "out.jsonl", runner=runner) == 0
    got = answers(tmp_path / "out.jsonl")
    assert [answer["status_code"] for answer in got] == [200, 200, 400, 400, 200, 400, 200, 400]
    assert got[5]["body"]["error"]["param"] == "input[1]"
    assert got[5]["body"]["error"]["code"] == "input_too_large"
    vectors = [item["embedding"] for item in got[6]["body"]["data"]]
    np.testing.assert_allclose(vectors, expected[2:4], atol=1e-7)


def test_ignored_fields_of_requests_are_said_once(
    encode: Encode, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [batch_line("a", inputtype="query"), batch_line("b", inputtype="query", user="u")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert encode("b.jsonl", "--openai-batch") == 0
    said = capfd.readouterr().err
    assert said.count("nobody knows are ignored: inputtype (input_type?)") == 1
    assert said.count("\n") == 1


def test_a_vector_that_is_not_finite_is_that_requests_error(
    encode: Encode, tmp_path: Path, golden_checkpoint: Path
) -> None:
    tokens = NVEmbedTokenizer.from_dir(golden_checkpoint).encode("x", max_tokens=9).ids.tolist()
    ids = [*tokens[:-1], 31999, tokens[-1]]
    lines = [batch_line("a"), batch_line("b", input=ids, token_ids="model")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runner = "tests.server.runners:NotANumber"
    assert encode("b.jsonl", "--openai-batch", runner=runner) == 0
    got = answers(tmp_path / "b.answers.jsonl")
    assert [answer["status_code"] for answer in got] == [200, 500]
    assert got[1]["body"]["error"]["code"] == "non_finite_vector"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"costom_id": "x"}, "line 1: unknown field 'costom_id'; did you mean custom_id?; known: "),
        ({"metadata": {}}, "line 1: unknown field 'metadata'"),
        ({"method": "GET"}, "line 1: method is 'GET', only POST is served"),
        ({"custom_id": 7}, "line 1: no custom_id"),
    ],
)
def test_a_line_that_is_no_request_refuses_the_file(
    encode: Encode,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    message: str,
) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({**batch_line(), **change}))
    assert encode("b.jsonl", "--openai-batch") == 1
    assert message in capsys.readouterr().err
    assert left(tmp_path) == ["a.txt", "b.jsonl"]
