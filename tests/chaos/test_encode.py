"""`nv-embed encode` killed at random moments, its files harmed, and resumed; two at once; a million
lines in constant memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.test_faults import FULL
from tests.server.processes import ROOT

KILLS = 50 if FULL else 2
PAIRS = 50 if FULL else 3
LINES = 1_000_000 if FULL else 30_000


# Batches are kept ten times a second instead of twice a minute: runs are short here.
PROGRAM = """
import sys
from server import cli
from server.offline import bulk
bulk.KEEP_EVERY_S = 0.1
sys.exit(cli.main())
"""


def start(model: Path, *options: str, seconds: float = 0) -> subprocess.Popen[bytes]:
    """seconds: of a batch of the runners that take any."""
    command = [sys.executable, "-c", PROGRAM, "encode", *options, "--model", str(model)]
    command += ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_SECONDS": str(seconds)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def harm(folder: Path, dice: random.Random) -> int:
    """Truncate or empty some of the files there; returns how many."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in (chosen := dice.sample(files, k=min(len(files), 3))):
        os.truncate(path, dice.choice([0, dice.randint(0, path.stat().st_size)]))
    return len(chosen)


def done(parts: Path) -> int:
    """How many shards are in the one file that grows there."""
    try:
        return (parts / ".joined.jsonl").read_bytes().count(b"\n") - 1
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("harmed", [False, True], ids=["killed", "killed and harmed"])
def test_killed_and_resumed_gives_the_same_bytes(
    golden_checkpoint: Path, tmp_path: Path, harmed: bool
) -> None:
    dice = random.Random(21)
    source = tmp_path / "texts.txt"
    words = ["a", "text", "of", "several", "words", "that", "goes", "on", "and", "on"]
    source.write_text(
        "".join(" ".join(dice.choices(words, k=dice.randint(1, 60))) + "\n" for _ in range(1500))
    )
    # By timing the whole run and the resumed one might choose products with other last bits.
    options = (str(source), "--shard-size", "100", "--cpu-products", "plain", "-o")
    finish(start(golden_checkpoint, *options, str(tmp_path / "whole.npy")))
    whole, target = (tmp_path / "whole.npy").read_bytes(), tmp_path / "resumed.npy"
    parts, killed, harms = tmp_path / "resumed.npy.parts", 0, 0
    for _ in range(KILLS):
        process = start(golden_checkpoint, *options, str(target), "--resume")
        wanted = done(parts) + dice.randint(1, 8)
        while process.poll() is None and done(parts) < wanted:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:  # it was quicker: once more from the beginning
            assert target.read_bytes() == whole
            target.unlink()
            (tmp_path / "resumed.npy.manifest.json").unlink()
        elif harmed:
            harms += harm(parts, dice)
    finish(start(golden_checkpoint, *options, str(target), "--resume"))
    assert killed >= 1
    assert not harmed or harms >= 1
    assert target.read_bytes() == whole
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*"))  # no lock, no temporary file


def test_two_at_once_never_mix(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Of the same and of other inputs, begun at random offsets, with and without --resume."""
    dice = random.Random(34)
    runner = ("--runner", "tests.server.runners:Hashing", "--shard-size", "40")
    sources, wholes = [], []
    for name in ("first", "second"):
        source = tmp_path / f"{name}.txt"
        source.write_text("".join(f"{name} line {number}\n" for number in range(400)))
        whole = tmp_path / f"{name}.npy"
        finish(start(golden_checkpoint, str(source), "-o", str(whole), *runner))
        sources.append(str(source))
        wholes.append(whole.read_bytes())
    refusals = 0
    for pair in range(PAIRS):
        target = tmp_path / f"pair{pair}.npy"
        which = (0, dice.randint(0, 1))
        processes = []
        for number in which:
            resume = ["--resume"] * dice.randint(0, 1)
            options = (sources[number], "-o", str(target), *runner, *resume)
            processes.append(start(golden_checkpoint, *options, seconds=0.05))
            time.sleep(dice.uniform(0, 1.5))
        errors = [process.communicate(timeout=60)[1].decode() for process in processes]
        codes = [process.returncode for process in processes]
        assert 0 in codes, errors
        written = {wholes[which[place]] for place, code in enumerate(codes) if code == 0}
        assert target.read_bytes() in written
        for code, error in zip(codes, errors, strict=True):
            assert code in (0, 1), error
            assert "Traceback" not in error
            if code:
                refusals += 1
                assert error.count("\n") == 1, error
    assert refusals >= 1
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("refused", "suffix"), [(0, ".npy"), (9, ".npy"), (9, "/")], ids=["file", "refused", "folder"]
)
def test_many_lines_take_constant_memory(
    golden_checkpoint: Path, tmp_path: Path, refused: int, suffix: str
) -> None:
    """The peak with all lines is the peak with a few shards' worth, and a little. refused: so many
    rows beside each line."""

    def peak(lines: int) -> int:
        source, target = tmp_path / f"{lines}.txt", f"{tmp_path}/{lines}{suffix}"
        with source.open("w") as file:
            file.writelines(f"line {number}\n" + "\n" * refused for number in range(lines))
        options = ("--runner", "tests.server.runners:Null", "--shard-size", "2048")
        options += ("--on-error", "skip")
        process = start(golden_checkpoint, str(source), "-o", target, *options)
        highest = 0
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except FileNotFoundError:
                break
            for line in status.splitlines():
                if line.startswith("RssAnon:"):
                    highest = max(highest, int(line.split()[1]))
            time.sleep(0.01)
        finish(process)
        found = [Path(target)] if suffix == ".npy" else Path(target).glob("*.npy")
        assert sum(len(np.load(path, mmap_mode="r")) for path in found) == lines
        skipped = f"{target}skipped.jsonl" if suffix == "/" else f"{target}.skipped.jsonl"
        if refused:
            with open(skipped, "rb") as file:
                assert sum(1 for _ in file) == refused * lines
        return highest

    few, many = peak(10_000), peak(LINES)
    assert many < 1.1 * few, (few, many)


@pytest.mark.skipif(not FULL, reason="tests/server/offline/test_bulk.py kills one, once")
def test_parts_killed_at_random_come_to_one_run(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Three at a time, each killed some times and begun again, in a folder that they share."""
    dice = random.Random(7)
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(f'{{"text": "line {n}", "id": {n}}}\n' for n in range(3000)))
    runner = ("--runner", "tests.server.runners:Hashing", "--shard-size", "50")
    options = (str(source), *runner, "--format", "parquet", "--id-field", "id", "-o")
    finish(start(golden_checkpoint, *options, f"{tmp_path}/one/"))
    left = dict.fromkeys(("1/3", "2/3", "3/3"), KILLS)
    running: dict[str, subprocess.Popen[bytes]] = {}
    kills = 0
    while left or running:
        for part in [part for part in left if part not in running][: 2 - len(running)]:
            again = (*options, f"{tmp_path}/parts/", "--part", part)
            running[part] = start(golden_checkpoint, *again, seconds=0.02)
        time.sleep(dice.uniform(0.5, 4))
        for part, process in list(running.items()):
            if left[part] and dice.random() < 0.5:
                process.send_signal(signal.SIGKILL)
                left[part] -= 1
            elif left[part] and process.poll() is None:
                continue
            _, errors = process.communicate(timeout=120)
            assert process.returncode in (0, -signal.SIGKILL), errors.decode()
            kills += process.returncode != 0
            del running[part]
            if process.returncode == 0:
                del left[part]
    one, parts = (
        {
            path.name: path.read_bytes()
            for path in (tmp_path / name).iterdir()
            if "lock" not in path.name
        }
        for name in ("one", "parts")
    )
    assert kills >= 2
    assert parts == one
