"""More work than the server can do, on two levels of priority: one stays quick, neither starves."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.chaos.test_faults import FULL
from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS, client_of

pytestmark = pytest.mark.timing

RATE = 100
"""Inputs a second that the runner does, one to a batch."""
SECONDS = 30.0 if FULL else 6.0
CLIENTS = {-1: 4, 0: 24, 1: 8}
"""By level: each sends its next text when the last is answered. All together ask for all that there
is; the highest level alone for less, since its four wait for a batch at a time."""


async def client(http: httpx.AsyncClient, level: int, end: float, waits: list[float]) -> None:
    number = 0
    while time.monotonic() < end:
        number += 1
        started = time.monotonic()
        fields = {"model": "golden-embed", "input": f"{level} {id(waits)} {number} {started}"}
        answer = await http.post("/v1/embeddings", json=fields | {"priority": level})
        assert answer.status_code == 200, answer.text
        waits.append(time.monotonic() - started)
        if level < 0:
            await asyncio.sleep(0.2)  # a person


async def measure(server: ServerProcess) -> dict[int, list[float]]:
    waits: dict[int, list[list[float]]] = {}
    async with client_of(server) as http:
        end = time.monotonic() + SECONDS
        async with asyncio.TaskGroup() as group:
            for level, count in CLIENTS.items():
                waits[level] = [[] for _ in range(count)]
                for own in waits[level]:
                    group.create_task(client(http, level, end, own))
    return {level: [wait for own in many for wait in own] for level, many in waits.items()}


def test_the_highest_level_is_quick_and_none_starves(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--runner", RUNNERS + "Paced", "--max-batch-seqs", "1", "--no-access-log")
    environment = {"FAKE_RATE": str(RATE)}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=environment) as server:
        waits = asyncio.run(measure(server))
    p99 = {level: float(np.quantile(all_, 0.99)) for level, all_ in waits.items()}
    counts = {level: len(all_) for level, all_ in waits.items()}
    print(f"p99 by level: {p99}; answers: {counts}")
    assert sum(counts.values()) > 0.7 * RATE * SECONDS, "it was not saturated, or stood still"
    assert p99[-1] <= p99[0] / 3
    assert counts[1] >= sum(counts.values()) / 20, "the lowest level has its turns"
