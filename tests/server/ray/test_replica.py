"""A replica with a real engine."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import StartError, UnavailableError
from server.ray.metrics import Instruments
from server.ray.replica import Replica
from tests.server.processes import ROOT, is_running
from tests.server.questions import RUNNERS

pytestmark = pytest.mark.process


class Silent:
    """An instrument of Ray's."""

    def __init__(self, *_: Any) -> None: ...

    def tell(self, *_: Any, **__: Any) -> None: ...

    set = inc = tell


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A replica has one of its own."""
    logger = logging.getLogger("nv_embed")
    before = logger.handlers, logger.level, logger.propagate
    switch, thresholds = sys.getswitchinterval(), gc.get_threshold()
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    logger.handlers, logger.level, logger.propagate = before
    sys.setswitchinterval(switch)
    gc.set_threshold(*thresholds)


def with_replica(
    checkpoint: Path, use: Callable[[Replica, httpx.AsyncClient], Awaitable[None]], **args: str
) -> None:
    """Run a test between a replica's start and its end."""

    async def run() -> None:
        replica = await started(checkpoint, "Hashing", **args)
        pid = worker_of(replica)
        try:
            transport = httpx.ASGITransport(replica.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://ray") as client:
                await use(replica, client)
        finally:
            await replica.stop()
        assert not is_running(pid)

    asyncio.run(run())


async def started(checkpoint: Path, runner: str, **more: str) -> Replica:
    args = {"model": str(checkpoint), "devices": "cpu", "runner": f"{RUNNERS}{runner}", **more}
    return await Replica.started(args, Instruments(Silent, Silent))


async def until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not predicate():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def worker_of(replica: Replica) -> int:
    (worker,) = replica._engine.metrics.workers
    assert worker.pid is not None
    return worker.pid


def test_it_serves_once_it_is_there_and_leaves_the_id_to_ray(golden_checkpoint: Path) -> None:
    async def use(replica: Replica, client: httpx.AsyncClient) -> None:
        replica.check_health()
        answer = await client.post("/v1/embeddings", json={"input": "x"})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert "x-request-id" not in answer.headers
        refused = await client.post("/v1/embeddings", json={"input": []})
        assert (refused.status_code, refused.headers.get("x-request-id")) == (400, None)

    with_replica(golden_checkpoint, use)


def test_it_asks_for_keys_of_a_file(golden_checkpoint: Path, tmp_path: Path) -> None:
    key = "a-key-of-a-file-on-each-node"
    file = tmp_path / "keys"
    file.write_text(f"{key}\n")

    async def use(replica: Replica, client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models")).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200

    with_replica(golden_checkpoint, use, api_key_file=str(file))


def test_it_is_unhealthy_while_its_worker_is_away(golden_checkpoint: Path) -> None:
    async def use(replica: Replica, client: httpx.AsyncClient) -> None:
        os.kill(worker_of(replica), signal.SIGKILL)
        await until(lambda: bool(replica._engine.not_ready))
        with pytest.raises(UnavailableError, match="not ready"):
            replica.check_health()
        await until(lambda: not replica._engine.not_ready)
        replica.check_health()

    with_replica(golden_checkpoint, use)


def test_a_start_that_fails_says_why(golden_checkpoint: Path) -> None:
    with pytest.raises(StartError, match="this runner refuses to start"):
        asyncio.run(started(golden_checkpoint, "Refusing"))
