"""`encode --devices cpu,cpu` against one, with one thread each: how many times as fast, and whether
the output is the same to the byte. For two idle cores; the load beside it is said.

Both take turns in every round; figures are medians. `whole` counts the start, `rate` is that of
the shards after the first few.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.server.processes import ROOT

_FIRST = 4
"""Shards that the rate leaves out."""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--model", help="default: the shipped one")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.txt"
        source.write_text(
            "".join(f"line {n} of a text of some fifteen words or so\n" for n in range(asked.texts))
        )
        found = [
            (_run(source, "cpu", asked), _run(source, "cpu,cpu", asked))
            for _ in range(asked.rounds)
        ]
    whole = statistics.median(one[0] / two[0] for one, two in found)
    rate = statistics.median(two[1] / one[1] for one, two in found)
    is_same = all(one[2] == two[2] for one, two in found)
    print(
        f"cpu,cpu is {whole:.2f} times as fast as cpu with its start, {rate:.2f} without;", end=" "
    )
    print(f"the same bytes: {is_same}; load {os.getloadavg()[0]:.1f}")
    return 0 if is_same else 1


def _run(
    source: Path, devices: str, asked: argparse.Namespace
) -> tuple[float, float, dict[str, bytes]]:
    """Seconds, shards a second, and what was written."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", "-m", "server.cli", "encode", str(source), "-o", folder]
        command += ["--devices", devices, "--threads", "1", "--cpu-products", "plain"]
        command += ["--dtype", "float32", "--shard-size", str(max(1, asked.texts // 40))]
        command += ["--model", asked.model] if asked.model else []
        began = time.perf_counter()
        subprocess.run(
            command,
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        seconds = time.perf_counter() - began
        shards = sorted(Path(folder).glob("part-*"))
        times = sorted(path.stat().st_mtime for path in shards)
        rate = (len(times) - _FIRST) / max(times[-1] - times[_FIRST - 1], 1e-9)
        return seconds, rate, {path.name: path.read_bytes() for path in Path(folder).iterdir()}


if __name__ == "__main__":
    sys.exit(main())
