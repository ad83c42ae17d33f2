"""The forward alone of this checkout and of another one, in turns: least times of lone texts and of
batches.

Each checkout runs in a process of its own with the same packages. In every round each process
computes each case some times; of a case the least time of all rounds counts. A ratio is the other
checkout's time divided by this one's: above 1 this one is quicker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import report, workloads
from tests.server.processes import ROOT

CASES = {
    "one text of 16": [16],
    "one text of 128": [128],
    "64 texts of 16": [16] * 64,
    "24 lognormal": workloads.lengths_of("lognormal", 24),
}
_CHILD = """
import json, sys, time
import numpy as np
from model.batch import Encoding, RunnerOptions
from model.runner import ModelRunner
runner = ModelRunner(RunnerOptions(**json.loads(sys.argv[1])))
runner.warm_up()
print(json.dumps([runner.info.dtype, getattr(runner.info, "products", {})]), flush=True)
for line in sys.stdin:
    lengths, seconds = json.loads(line)
    ids = [np.arange(5, 5 + n, dtype=np.int32) * 7 % 31_000 + 3 for n in lengths]
    batch = [Encoding(row) for row in ids]
    times = []
    runner.embed(batch)
    while sum(times) < seconds:
        start = time.perf_counter()
        runner.embed(batch)
        times.append(time.perf_counter() - start)
    print(json.dumps(min(times)), flush=True)
"""


class Checkout:
    """A process that computes with the code of this folder. A context manager."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD, json.dumps(options)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.dtype, self.products = self._answer()

    def __enter__(self) -> Checkout:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._process:  # closes its pipes and waits
            self._process.kill()

    def least(self, lengths: Sequence[int], seconds: float) -> float:
        """Of the forwards of this batch that take so long in all, the quickest one's seconds."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([list(lengths), seconds]) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a checkout's process ended ({self._process.wait()})")
        return json.loads(line)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--against", required=True, help="another checkout")
    parser.add_argument("--model", default="small,trunk", help="small, trunk, wide, or folders")
    parser.add_argument("--dtype", default="float32", help="auto, float32, bfloat16: a,b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case of a round")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    out = report.Report("versions", __doc__ or "", report.settings_of(options))
    out.start()
    for name in options.model.split(","):
        path = str(workloads.checkpoint(name, options.scratch))
        for dtype in options.dtype.split(","):
            chosen = {"path": path, "dtype": dtype, "threads": options.threads}
            _measure(out, f"{name} {dtype}", chosen, options)
    out.finish(
        options.results, group="what", label="case", value="other_by_this", unit="other ÷ this"
    )


def _measure(out: report.Report, what: str, chosen: dict[str, Any], options: Any) -> None:
    with ExitStack() as stack:
        this, other = (
            stack.enter_context(Checkout(folder, chosen))
            for folder in (ROOT, Path(options.against).resolve())
        )
        seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
        for _ in range(options.rounds):
            for case, lengths in CASES.items():
                pair = [one.least(lengths, options.seconds) for one in (this, other)]
                seconds[case].append((pair[0], pair[1]))
    for case, pairs in seconds.items():
        mine, theirs = map(min, zip(*pairs, strict=True))
        out.add(
            what=what,
            dtype=this.dtype,
            other_dtype=other.dtype,
            by=" ".join(map(str, this.products.values())),
            case=case,
            ms=mine * 1e3,
            other_ms=theirs * 1e3,
            other_by_this=theirs / mine,
        )
        out.ratios[f"{what}, {case}: other / this"] = theirs / mine
    out.raw[what] = seconds
    print(f"measured: {what}", flush=True)


if __name__ == "__main__":
    main()
