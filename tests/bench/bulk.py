"""`encode` against the packed forward alone: what reading, tokenizing and writing add to it.

The default model embeds lines of a file, in this process. Its batches then run again, as they
were, through the same runner and nothing else; both take turns. `share` is the forward's time
divided by that of the run from its first batch to its last row on disk.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.batch import Encoding
from model.runner import ModelRunner
from server.cli.command_line import main as nv_embed

TEXT = "a corpus is embedded once and searched for years by people who never see it"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--least", type=float, default=0.0, help="status 1 where the share is less")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.txt"
        lines = (TEXT[: 10 + 5 * (number % 14)] for number in range(asked.texts))
        source.write_text("".join(f"{number} {line}\n" for number, line in enumerate(lines)))
        shares = [_share(source, Path(folder) / f"{number}.npy") for number in range(asked.rounds)]
    share = statistics.median(shares)
    print(f"the forward alone takes {share:.3f} of the run's time;", end=" ")
    print(f"rounds {[round(one, 3) for one in shares]}; load {os.getloadavg()[0]:.1f}")
    return 1 if share < asked.least else 0


def _share(source: Path, output: Path) -> float:
    batches: list[Sequence[Encoding]] = []
    runners: list[ModelRunner] = []
    starts: list[float] = []
    embed = ModelRunner.embed

    def noted(runner: ModelRunner, encodings: Sequence[Encoding]) -> object:
        starts.append(time.perf_counter())
        batches.append(list(encodings))
        runners.append(runner)
        return embed(runner, encodings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "embed", noted)
        assert nv_embed(["encode", str(source), "-o", str(output)]) == 0
        whole = time.perf_counter() - starts[0]
    began = time.perf_counter()
    for runner, encodings in zip(runners, batches, strict=True):
        embed(runner, encodings)
    return (time.perf_counter() - began) / whole


if __name__ == "__main__":
    sys.exit(main())
