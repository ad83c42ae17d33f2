"""`make test-ray-encode`: `encode --engine ray` on a cluster whose actors and nodes come and go.

What is written is to the byte what this machine writes alone, and either engine goes on with what
the other has begun. Runs in a network of its own. Ends with status 1 where anything is wrong or a
process is left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.checkpoints import write_checkpoint
from tests.ray.program import Program, in_own_network
from tests.server.questions import RUNNERS

ROWS, FEWER_ROWS, REAL_ROWS = 100_000, 20_000, 5_000
SHARD_ROWS = 1_000
ACTORS = "ray::MapWorker"
PATIENCE_S = 180.0
RAY = ("--engine", "ray", "--actors", "3")
"""More than the first node has cores for."""


def main() -> int:
    if not in_own_network():
        print("this network is not one of its own: make test-ray-encode")
        return 2
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        wrong = list(_problems(Path(name)))
    print("\n".join(wrong) or "all is the same, whoever does it")
    return 1 if wrong else 0


def _problems(folder: Path) -> Iterator[str]:
    checkpoint = write_checkpoint(folder / "golden")
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"encode, {time.monotonic() - began:.0f} s: {what}", flush=True)

    # Slow enough that there is something to kill.
    nodes = Program("tests.ray.nodes", folder, (), {"FAKE_SECONDS": "0.01"})
    trial = _Trial(folder, checkpoint, nodes)
    try:
        yield from trial.killed_and_moved()
        say(f"{ROWS} rows; an actor killed, a node added and removed")
        yield from trial.begun_by_one_and_finished_by_the_other()
        say(f"twice {FEWER_ROWS} rows, begun by one engine and finished by the other")
        yield from trial.the_default_model()
        say(f"{REAL_ROWS} rows with the default model")
    finally:
        left = nodes.stop()
        say("stopped")
    if left:
        yield f"left: {left}"


class _Trial:
    """On one cluster, in one folder."""

    def __init__(self, folder: Path, checkpoint: Path, nodes: Program) -> None:
        self._folder, self._nodes = folder, nodes
        self._hashing = ["--model", str(checkpoint), "--runner", f"{RUNNERS}Hashing"]
        self._hashing += ["--shard-size", str(SHARD_ROWS)]

    def killed_and_moved(self) -> Iterator[str]:
        name = self._write("all.jsonl", ROWS)
        self._run(name, "local/", *self._hashing)
        process = self._start(name, "dealt/", *self._hashing, *RAY)
        self._wait(process, "dealt", 5)
        victim = self._nodes.processes(ACTORS)[0]
        os.kill(victim, signal.SIGKILL)
        self._nodes.tell("add")
        while len(self._nodes.processes(ACTORS)) < 3 and process.poll() is None:
            time.sleep(0.1)
        self._wait(process, "dealt", self._shards("dealt") + 10)
        self._nodes.tell("remove")
        if process.poll() is not None:
            yield "it ended before the third actor had a node, or that was taken away"
        yield from self._ended(process)
        yield from self._differ("local", "dealt")

    def begun_by_one_and_finished_by_the_other(self) -> Iterator[str]:
        name = self._write("fewer.jsonl", FEWER_ROWS)
        self._run(name, "whole/", *self._hashing)
        for first, second, target in (((), RAY, "here"), (RAY, (), "there")):
            process = self._start(name, f"{target}/", *self._hashing, *first)
            self._wait(process, target, 3)
            process.kill()
            process.wait()
            while self._nodes.processes(ACTORS):  # Ray ends them
                time.sleep(0.1)
            self._run(name, f"{target}/", *self._hashing, *second, "--resume")
            yield from self._differ("whole", target)

    def the_default_model(self) -> Iterator[str]:
        name = self._write("real.jsonl", REAL_ROWS)
        # Products are else chosen by their time, perhaps otherwise by each engine.
        options = ["--shard-size", "500", "--dtype", "float32", "--cpu-products", "plain"]
        self._run(name, "one/", *options)
        self._run(name, "two/", *options, *RAY)
        yield from self._differ("one", "two")

    def _write(self, name: str, rows: int) -> str:
        dice = random.Random(rows)
        words = ["some", "words", "of", "a", "line", "größer", "日本語"]
        with (self._folder / name).open("w") as file:
            for number in range(rows):
                text = " ".join(dice.choices(words, k=dice.randint(1, 30)))
                file.write(json.dumps({"id": number, "text": text}) + "\n")
        return name

    def _start(self, name: str, output: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "server.cli", "encode", name, "-o", output]
        command += ["--device", "cpu", "--threads", "1", *options]
        environment = {**self._nodes.environment, "RAY_ADDRESS": self._nodes.first}
        with (self._folder / "encode.log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=self._folder, env=environment, stdout=log, stderr=log
            )

    def _run(self, name: str, output: str, *options: str) -> None:
        wrong = list(self._ended(self._start(name, output, *options)))
        assert not wrong, wrong

    def _ended(self, process: subprocess.Popen[bytes]) -> Iterator[str]:
        if process.wait(PATIENCE_S) != 0:
            yield f"status {process.returncode}: {self._log()}"

    def _log(self) -> str:
        return (self._folder / "encode.log").read_text(errors="replace")[-3000:]

    def _shards(self, target: str) -> int:
        return len(list((self._folder / target).glob("part-*")))

    def _wait(self, process: subprocess.Popen[bytes], target: str, shards: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self._shards(target) < shards:
            assert process.poll() is None, f"it ended too early: {self._log()}"
            assert time.monotonic() < deadline, self._log()
            time.sleep(0.05)

    def _differ(self, one: str, other: str) -> Iterator[str]:
        """To the byte, the manifest too; and nothing else is left."""
        found = [
            {path.name: path.read_bytes() for path in (self._folder / name).iterdir()}
            for name in (one, other)
        ]
        if found[0] != found[1]:
            names = {n for n in found[0] | found[1] if found[0].get(n) != found[1].get(n)}
            yield f"{other} is not {one}: {sorted(names)[:5]} of {len(found[0])} files"


if __name__ == "__main__":
    sys.exit(main())
