"""SIGTERM and SIGKILL in the middle of a load."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.chaos.load import Answer, Connection, address, post
from tests.chaos.test_faults import FULL
from tests.server.processes import ServerProcess, is_running
from tests.server.questions import RUNNERS, Questions
from tests.server.runners import vector_of

CLIENTS = 400 if FULL else 100
LOADED = 5 * CLIENTS if FULL else CLIENTS
"""So many are answered before the signal."""
DRAIN_S = 60.0
OPTIONS = ("--runner", RUNNERS + "Hashing", "--devices", "cpu,cpu", "--no-access-log")
SLOW = {"FAKE_SECONDS": "0.1"}


@dataclass
class Exchange:
    connected: float  # monotonic seconds
    sent: float
    finished: float
    ids: list[list[int]]
    answer: Answer


def check(exchange: Exchange) -> None:
    data = json.loads(exchange.answer.body)["data"]
    got = np.array([item["embedding"] for item in data], dtype=np.float32)
    want = np.stack([vector_of(ids) for ids in exchange.ids])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


class Clients:
    """Each asks again as soon as it is answered, until it is refused or cannot connect."""

    def __init__(self, server: ServerProcess, model: Path) -> None:
        self._address = address(server)
        questions = Questions(model, seed=41)
        self._questions = [questions.request() for _ in range(200)]
        self.exchanges: list[Exchange] = []

    async def run(self) -> None:
        await asyncio.gather(*(self._one(index) for index in range(CLIENTS)))

    async def loaded(self) -> None:
        async with asyncio.timeout(60):
            while len(self.exchanges) < LOADED:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _one(self, index: int) -> None:
        connection = None
        while True:
            if connection is None or not connection.open:
                try:
                    connection = await Connection.to(*self._address)
                except OSError:
                    return
            inputs, ids = self._questions[index % len(self._questions)]
            index += CLIENTS + 1
            request = post(json.dumps({"model": "golden-embed", "input": inputs}).encode())
            sent = time.monotonic()
            answer = await connection.ask(request)
            self.exchanges.append(Exchange(connection.opened, sent, time.monotonic(), ids, answer))
            if answer.status != 200:
                connection.close()
                return


def test_sigterm_under_load_loses_nothing_that_was_accepted(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    options = (*OPTIONS, "--drain-timeout", str(DRAIN_S))
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log", env=SLOW).wait_ready()
    clients = Clients(server, golden_checkpoint)

    async def run() -> float:
        asking = asyncio.create_task(clients.run())
        await clients.loaded()
        server.process.send_signal(signal.SIGTERM)
        terminated = time.monotonic()
        await asking
        return terminated

    try:
        terminated = asyncio.run(run())
        assert server.process.wait(DRAIN_S) == 0, server.log
        assert time.monotonic() - terminated < DRAIN_S
    finally:
        server.process.kill()
        server.stop()
    assert "Traceback" not in server.log
    assert "drain timed out" not in server.log  # a 503 is a refusal, never a lost answer
    outcomes = {"answered": 0, "answered after the signal": 0, "refused": 0, "too late": 0}
    for exchange in clients.exchanges:
        answer = exchange.answer
        if answer.status == 200:
            check(exchange)
            after = exchange.finished > terminated
            outcomes["answered after the signal" if after else "answered"] += 1
        elif answer.status == 503:
            assert exchange.finished > terminated
            assert answer.headers[b"connection"] == b"close"
            assert answer.headers[b"retry-after"]
            outcomes["refused"] += 1
        else:
            # A connection that nobody accepted any more; never one from before the signal.
            assert answer.status == 0, answer
            assert exchange.connected > terminated
            outcomes["too late"] += 1
    print(outcomes)
    assert outcomes["answered"] > CLIENTS // 2
    assert outcomes["answered after the signal"] > CLIENTS // 4
    assert outcomes["refused"] > CLIENTS // 4


def test_no_worker_outlives_a_server_killed_under_load(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    server = ServerProcess(golden_checkpoint, *OPTIONS, log=tmp_path / "log", env=SLOW)
    server.wait_ready().wait_for_metric("nv_embed_workers_ready", 2)
    workers = server.worker_pids()
    clients = Clients(server, golden_checkpoint)

    async def run() -> None:
        asking = asyncio.create_task(clients.run())
        await clients.loaded()
        server.process.kill()
        async with asyncio.timeout(2):
            while any(map(is_running, workers)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asking

    asyncio.run(run())
    server.stop()
    assert sum(exchange.answer.status == 200 for exchange in clients.exchanges) > 0
