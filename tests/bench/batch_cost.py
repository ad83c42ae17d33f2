"""What a batch costs its worker, given or fitted to what a server has measured.

A batch takes `batch + token · tokens + input · inputs` seconds. Knows no queue and no clock.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

_SUMS = {
    "batches": "nv_embed_batch_duration_seconds_count",
    "seconds": "nv_embed_batch_duration_seconds_sum",
    "tokens": "nv_embed_batch_tokens_sum",
    "inputs": "nv_embed_batch_inputs_sum",
}


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
