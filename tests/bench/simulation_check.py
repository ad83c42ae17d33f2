"""The simulation beside a real server: the same requests, sent to both at the same moments.

The server has two workers whose batches take a known time (`runners.Paced`). What else the
simulation needs is measured first, one request at a time: what batches take in all, what
processor time the front needs for requests of several sizes, and what passes beside that. Nothing
is changed afterwards.
"""

from __future__ import annotations

import asyncio
import gc
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from model.batch import BatchLimits
from tests.bench import batch_cost, front
from tests.bench.batch_cost import Batches, Cost
from tests.bench.report import median
from tests.bench.simulation import Arrival, Front, Outcome, Setup, poisson, simulate
from tests.chaos.load import METRICS, Connection, address, post
from tests.checkpoints import write_checkpoint
from tests.server.processes import ServerProcess

BARS = {"answers_per_s": 0.05, "p50_ms": 0.15, "p99_ms": 0.25, "refused": 0.05}
"""How far the prediction may be from what is measured: as a part of that, refusals in points."""
LIMITS = BatchLimits(32_768, 256)
WORKERS = 2
QUEUE = 300_000
PACE = Cost(0.1, 28e-6)
"""A full batch takes a second: what the HTTP path costs is small beside it, and so is what other
programs on the machine do."""
_LONE = ((64,), (4000,), (64,) * 16, (1000,) * 16)
"""Requests sent alone, one after another: few and many tokens, one input and several."""
_EACH = 20
_ATTEMPTS = 3
"""A run that other programs disturbed says nothing. Whether they did shows without its outcome."""


class Compared(NamedTuple):
    """One figure at one load."""

    name: str
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """In the unit of its bar."""
        if self.name == "refused":
            return abs(self.predicted - self.measured)
        return abs(self.predicted / self.measured - 1) if self.measured else math.inf

    @property
    def holds(self) -> bool:
        return self.off <= BARS[self.name]  # and not for NaN


class Disturbance(NamedTuple):
    """What other programs on the machine, or the clients themselves, did to a run."""

    late_s: float  # how late the clients sent, p99
    over: float  # how much longer batches took than they slept

    def is_slight(self, p99: float) -> bool:
        """Beside latencies of this size."""
        return self.late_s <= 0.05 * p99 and self.over <= 0.03

    def __str__(self) -> str:
        return f"sent {1e3 * self.late_s:.0f} ms late (p99), batches {self.over:+.1%}"


def figures(outcome: Outcome) -> dict[str, float]:
    """Those that are compared."""
    return {
        "answers_per_s": outcome.answers_per_s,
        "p50_ms": 1e3 * outcome.latency(0.5),
        "p99_ms": 1e3 * outcome.latency(0.99),
        "refused": outcome.count(429) / max(1, len(outcome)),
    }


def compare(predicted: Outcome, measured: Outcome) -> list[Compared]:
    said, seen = figures(predicted), figures(measured)
    return [Compared(name, said[name], seen[name]) for name in BARS]


def request_sizes(seed: int = 3) -> list[tuple[int, ...]]:
    """Lone texts and lists of 2 to 16, of lognormal lengths around 600 tokens; 3 in 4 are lone."""
    generator = np.random.default_rng(seed)
    sizes = []
    for _ in range(1000):
        count = 1 if generator.random() < 0.75 else int(generator.integers(2, 17))
        lengths = np.clip(generator.lognormal(math.log(500), 0.7, count), 4, 4000)
        sizes.append(tuple(int(length) for length in lengths))
    return sizes


@dataclass
class PacedServer:
    """A real one, and what a client on the same machine does to it."""

    server: ServerProcess
    model: str
    pace: Cost
    _ids: random.Random

    @classmethod
    @contextmanager
    def running(cls, pace: Cost) -> Iterator[PacedServer]:
        options = (
            "--runner",
            "tests.bench.runners:Paced",
            "--devices",
            ",".join(["cpu"] * WORKERS),
        )
        options += ("--max-batch-tokens", str(LIMITS.max_tokens))
        options += ("--max-batch-seqs", str(LIMITS.max_seqs))
        options += ("--max-queued-tokens", str(QUEUE), "--min-ready-workers", str(WORKERS))
        pace_of = {"PACED_BATCH_S": str(pace.batch), "PACED_TOKEN_S": str(pace.token)}
        with tempfile.TemporaryDirectory() as folder:
            model = write_checkpoint(Path(folder, "paced"))
            server = ServerProcess(model, *options, log=Path(folder, "log"), env=pace_of)
            try:
                server.wait_ready()
                name = server.client.get("/v1/models").json()["data"][0]["id"]
                yield cls(server, name, pace, random.Random(5))
            finally:
                server.stop()

    def body(self, tokens: Sequence[int]) -> bytes:
        """Of a request with inputs of so many ids, no two alike: a whole request in bytes."""
        inputs = [[1, *self._ids.choices(range(3, 30_000), k=n - 2), 2] for n in tokens]
        said = {"model": self.model, "input": inputs, "encoding_format": "base64"}
        return post(orjson.dumps(said))

    # One at a time

    def setup(self) -> Setup:
        """What the simulation is told, measured."""
        return asyncio.run(self._measure_lone())

    async def _measure_lone(self) -> Setup:
        connection = await Connection.to(*address(self.server))
        pid = self.server.process.pid
        samples: list[Batches] = []
        front_s: list[list[float]] = []  # [requests, tokens, inputs, seconds of its processor]
        beside: list[float] = []
        for tokens in _LONE:
            requests = [self.body(tokens) for _ in range(_EACH)]
            await connection.ask(requests[0])
            before = await self._totals()
            cpu = front.cpu_ns(pid)
            answers = [await connection.ask(request) for request in requests[1:]]
            taken = (front.cpu_ns(pid) - cpu) / 1e9
            batches = batch_cost.between(before, await self._totals())
            assert all(answer.status == 200 for answer in answers), answers[-1]
            assert batches.tokens == sum(tokens) * len(answers), "tokens are counted otherwise"
            samples.append(batches)
            front_s.append([len(answers), batches.tokens, batches.inputs, taken])
            lone = median(answer.seconds for answer in answers)
            beside.append(lone - (batches.seconds + taken) / len(answers))
        connection.close()
        await asyncio.sleep(0)  # until it is
        request, token, row = _front_cost(front_s)
        wire = max(0.0, median(beside))
        of_front = Front(request / 2, token, request / 2, row, wire)
        return Setup(
            batch_cost.fitted(samples),
            LIMITS,
            of_front,
            workers=WORKERS,
            max_queued_tokens=QUEUE,
            ids=True,
        )

    async def _totals(self) -> Batches:
        """On a new connection: one that was idle for long is closed."""
        connection = await Connection.to(*address(self.server))
        answer = await connection.ask(METRICS)
        connection.close()
        assert answer.status == 200, answer
        return batch_cost.totals(answer.body.decode())

    # Open loop

    def send(self, arrivals: Sequence[Arrival]) -> tuple[Outcome, Disturbance]:
        """Each request when it is due, whatever has become of earlier ones; latency counts from
        then."""
        bodies = [self.body(arrival.tokens) for arrival in arrivals]
        gc.collect()
        gc.disable()  # else it stops the clients, in whose latency that would count
        try:
            return asyncio.run(self._send(arrivals, bodies))
        finally:
            gc.enable()

    async def _send(
        self, arrivals: Sequence[Arrival], bodies: Sequence[bytes]
    ) -> tuple[Outcome, Disturbance]:
        loop, where = asyncio.get_running_loop(), address(self.server)
        idle: list[Connection] = []
        count = len(arrivals)
        seen = Outcome([0] * count, [math.nan] * count, [math.nan] * count, arrivals[-1].at)
        late = [0.0] * count
        before = await self._totals()
        begin = loop.time() + 0.1

        async def ask(index: int) -> None:
            due = begin + arrivals[index].at
            while idle and not idle[-1].open:
                idle.pop()
            connection = idle.pop() if idle else await Connection.to(*where)
            late[index] = loop.time() - due
            answer = await connection.ask(bodies[index])
            seen.statuses[index] = answer.status
            seen.done[index] = loop.time() - begin
            seen.seconds[index] = loop.time() - due
            if connection.open:
                idle.append(connection)

        async with asyncio.TaskGroup() as group:
            for index, arrival in enumerate(arrivals):
                wait = begin + arrival.at - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                group.create_task(ask(index))
        batches = batch_cost.between(before, await self._totals())
        for connection in idle:
            connection.close()
        await asyncio.sleep(0)  # until they are
        seen.batches, seen.batch_tokens = int(batches.batches), int(batches.tokens)
        slept = batches.batches * self.pace.batch + batches.tokens * self.pace.token
        return seen, Disturbance(float(np.quantile(late, 0.99)), batches.seconds / slept - 1)


def _front_cost(rows: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Seconds of a request, of a token, of a vector: least squares, none below zero."""
    from scipy.optimize import nnls

    table = np.array(rows)
    (request, token, row), _ = nnls(table[:, :3] / table[:, 3:], np.ones(len(table)))
    return float(request), float(token), float(row)


def check(
    loads: Sequence[float], seconds: float, seed: int, pace: Cost = PACE
) -> tuple[Setup, list[dict[str, Any]], bool]:
    """-> (what was measured first; a row for each figure at each load; whether each holds)."""
    sizes = request_sizes()
    tokens, inputs = (sum(map(of, sizes)) for of in (sum, len))
    rows: list[dict[str, Any]] = []
    with PacedServer.running(pace) as server:
        setup = server.setup()
        rate = setup.tokens_per_s(tokens / inputs) / (tokens / len(sizes))
        for load in loads:
            arrivals = poisson(load * rate, seconds, sizes, seed)
            predicted = simulate(setup, arrivals)
            for _ in range(_ATTEMPTS):
                measured, disturbance = server.send(arrivals)
                print(f"load {load:g}: {len(arrivals)} requests; {disturbance}", flush=True)
                if slight := disturbance.is_slight(predicted.latency(0.99)):
                    break
            assert set(measured.statuses) <= {200, 429}, set(measured.statuses)
            for found in compare(predicted, measured):
                rows.append(
                    {
                        "load": load,
                        "figure": found.name,
                        "predicted": found.predicted,
                        "measured": found.measured,
                        "off": found.off,
                        "bar": BARS[found.name],
                        "holds": "yes" if found.holds else "NO",
                        "disturbed": "" if slight else "yes",
                    }
                )
    return setup, rows, all(row["holds"] == "yes" for row in rows)
