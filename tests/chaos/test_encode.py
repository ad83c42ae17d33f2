"""`nv-embed encode` killed at random moments and resumed; a million lines in constant memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.chaos.test_faults import FULL
from tests.server.processes import ROOT

KILLS = 20 if FULL else 4
LINES = 1_000_000 if FULL else 30_000


def start(model: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "server.cli", "encode", *options, "--model", str(model)]
    command += ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()


def test_killed_and_resumed_gives_the_same_bytes(golden_checkpoint: Path, tmp_path: Path) -> None:
    dice = random.Random(21)
    source = tmp_path / "texts.txt"
    words = ["a", "text", "of", "several", "words", "that", "goes", "on", "and", "on"]
    source.write_text(
        "".join(" ".join(dice.choices(words, k=dice.randint(1, 60))) + "\n" for _ in range(3000))
    )
    options = (str(source), "--shard-size", "100", "-o")
    started = time.monotonic()
    finish(start(golden_checkpoint, *options, str(tmp_path / "whole.npy")))
    whole_run = time.monotonic() - started
    killed = 0
    for _ in range(KILLS):
        process = start(golden_checkpoint, *options, str(tmp_path / "resumed.npy"), "--resume")
        time.sleep(dice.uniform(0.2, 1.0) * whole_run)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
    finish(start(golden_checkpoint, *options, str(tmp_path / "resumed.npy"), "--resume"))
    assert killed >= 1
    assert (tmp_path / "resumed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not list(tmp_path.glob("*.parts"))
    assert not list(tmp_path.glob(".*.tmp"))


def test_many_lines_take_constant_memory(golden_checkpoint: Path, tmp_path: Path) -> None:
    """The peak with all lines is the peak with a few shards' worth, and a little."""

    def peak(lines: int) -> int:
        source, target = tmp_path / f"{lines}.txt", tmp_path / f"{lines}.npy"
        with source.open("w") as file:
            file.writelines(f"line {number}\n" for number in range(lines))
        options = ("--runner", "tests.server.runners:Null", "--shard-size", "2048")
        process = start(golden_checkpoint, str(source), "-o", str(target), *options)
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
        assert np.load(target, mmap_mode="r").shape == (lines, 64)
        return highest

    few, many = peak(10_000), peak(LINES)
    assert many < 1.1 * few, (few, many)
