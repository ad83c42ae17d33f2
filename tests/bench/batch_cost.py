"""What a batch costs its worker: given, or fitted to batches that were measured.

A batch takes `batch + token · tokens + input · inputs` seconds. Knows no queue and no clock.
`python -m tests.bench.batch_cost --model small > batches.csv` measures a model here, each
batch the least of several runs, for `python -m tests.bench.simulate --fit batches.csv`.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from model.batch import CPU_BATCH_TOKENS, RunnerOptions
from tests.bench import workloads

_SUMS = {
    "batches": "nv_embed_batch_duration_seconds_count",
    "seconds": "nv_embed_batch_duration_seconds_sum",
    "tokens": "nv_embed_tokens_total",
    "inputs": "nv_embed_inputs_total",
}
"""All of them are counted when a batch is done: histograms of its tokens, when it begins."""


class Batches(NamedTuple):
    """Batches that were measured together: how many, and the sums over them."""

    batches: float
    tokens: float
    inputs: float
    seconds: float


class Cost(NamedTuple):
    """Seconds of a batch, of each token and of each input in it."""

    batch: float
    token: float
    input: float = 0.0

    def seconds(self, tokens: int, inputs: int) -> float:
        return self.batch + self.token * tokens + self.input * inputs

    def __str__(self) -> str:
        return f"{1e3 * self.batch:.4g}:{1e6 * self.token:.4g}:{1e6 * self.input:.4g}"


def parse(text: str) -> Cost:
    """`4:25` or `4:25:10`: milliseconds a batch, microseconds a token, microseconds an input."""
    batch, token, *rest = map(float, text.split(":"))
    (of_input,) = rest or (0.0,)
    return Cost(1e-3 * batch, 1e-6 * token, 1e-6 * of_input)


def fitted(samples: Sequence[Batches]) -> Cost:
    """By least squares of the relative errors, no part below zero. Raises ValueError where samples
    are too few or too alike to tell a batch's part from a token's."""
    rows = np.array([sample for sample in samples if sample.batches and sample.seconds > 0], float)
    if len(rows) < 2 or np.linalg.matrix_rank(rows[:, :2] / rows[:, 3:]) < 2:
        raise ValueError("a fit needs batches of at least two sizes")
    from scipy.optimize import nnls

    solved, _ = nnls(rows[:, :3] / rows[:, 3:], np.ones(len(rows)))
    return Cost(*map(float, solved))


def error_of(cost: Cost, samples: Sequence[Batches]) -> float:
    """The median of how far a sample is from what the cost says, as a part of it."""
    said = [s.batches * cost.batch + s.tokens * cost.token + s.inputs * cost.input for s in samples]
    return float(np.median([abs(a / s.seconds - 1) for a, s in zip(said, samples, strict=True)]))


def read_csv(path: Path) -> list[Batches]:
    """Columns tokens, seconds and, if there, inputs (1) and batches (1: each row is a batch)."""
    with path.open(newline="") as file:
        return [
            Batches(
                float(row.get("batches") or 1),
                float(row["tokens"]),
                float(row.get("inputs") or 1),
                float(row["seconds"]),
            )
            for row in csv.DictReader(file)
        ]


def totals(metrics: str) -> Batches:
    """Since the server's start, of the text of its /metrics."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return Batches(**{field: sums[name] for field, name in _SUMS.items()})


def between(before: Batches, after: Batches) -> Batches:
    return Batches(*(b - a for a, b in zip(before, after, strict=True)))


def watched(url: str, seconds: float, every: float = 1.0) -> Iterator[Batches]:
    """What a server's workers do meanwhile, by its own /metrics, an interval after the other. The
    load on it has to vary, or all batches are alike."""
    with httpx.Client(base_url=url, timeout=60) as client:
        before = totals(client.get("/metrics").text)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(every)
            after = totals(client.get("/metrics").text)
            if after.batches > before.batches:
                yield between(before, after)
            before = after


def measured(options: RunnerOptions, lengths: Sequence[int], runs: int) -> Iterator[Batches]:
    """The largest batch, a half of it, a quarter … of texts of each of these lengths. Of one thread
    the processor's time is taken, from which other programs take less."""
    from model.runner import ModelRunner

    alone = options.device == "cpu" and options.threads == 1
    clock = time.process_time if alone else time.perf_counter
    runner = ModelRunner(options)
    runner.warm_up()
    for length in lengths:
        inputs = max(1, options.max_batch_tokens // length)
        while inputs:
            encodings = workloads.encodings_of(f"all-{length}", inputs)
            least = float("inf")
            for _ in range(runs):
                begun = clock()
                runner.embed(encodings)
                least = min(least, clock() - begun)
            yield Batches(1, inputs * length, inputs, least)
            inputs //= 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="small", help="small (the shipped one), or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-batch-tokens", type=int, default=CPU_BATCH_TOKENS)
    parser.add_argument("--lengths", default="16,64,256", help="tokens of a text")
    parser.add_argument("--runs", type=int, default=20, help="of each batch; the least counts")
    options = parser.parse_args()
    runner = RunnerOptions(
        str(workloads.checkpoint(options.model, Path("build/bench"))),
        device=options.device,
        threads=options.threads,
        max_batch_tokens=options.max_batch_tokens,
    )
    lengths = [int(length) for length in options.lengths.split(",")]
    writer = csv.writer(sys.stdout)
    writer.writerow(Batches._fields)
    for batch in measured(runner, lengths, options.runs):
        writer.writerow(f"{value:.5g}" for value in batch)


if __name__ == "__main__":
    main()
