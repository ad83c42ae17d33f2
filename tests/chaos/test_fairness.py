"""One key floods the queue: what do the others notice?"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from pathlib import Path

import pytest

from tests.chaos.load import Connection, address, post
from tests.chaos.test_faults import FULL
from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS, WORDS

pytestmark = pytest.mark.timing

BATCH_S = 0.15
SECONDS, RATE = (40.0, 5.0) if FULL else (5.0, 10.0)
FLOODING = 130
"""Connections of the flood, each with a request of 8 inputs: more than its share of the queue, and
more requests than ten batches hold."""
OPTIONS = (
    *("--runner", RUNNERS + "Hashing", "--no-access-log", "--max-queued-tokens", "300000"),
    *("--max-key-share", "0.5"),
)


def asked(key: str, inputs: list[str]) -> bytes:
    body = json.dumps({"model": "golden-embed", "input": inputs})
    return post(body.encode(), f"authorization: Bearer {key}")


async def flood(server: ServerProcess, stop: asyncio.Event, seed: int) -> None:
    """As fast as it goes; after a refusal a moment's rest."""
    dice = random.Random(seed)  # of equal texts only one would be computed
    connection = await Connection.to(*address(server))
    try:
        while not stop.is_set():
            texts = [" ".join(dice.choices(WORDS, k=120)) for _ in range(8)]
            answer = await connection.ask(asked("key-of-the-flood", texts))
            if answer.status != 200:
                await asyncio.sleep(0.2)
    finally:
        connection.close()


async def queued(server: ServerProcess, stop: asyncio.Event) -> list[float]:
    """Tokens in the queue, now and then."""
    seen = []
    while not stop.is_set():
        seen.append(await asyncio.to_thread(server.metric, "nv_embed_queued_tokens"))
        await asyncio.sleep(0.2)
    return seen


async def search(server: ServerProcess) -> list[float]:
    """Single texts at random moments, whatever became of the others; seconds of each. They are as
    long as the flood's: shorter ones would slip into what it leaves of a batch."""
    dice, end = random.Random(5), time.monotonic() + SECONDS

    async def one(number: int) -> float:
        connection = await Connection.to(*address(server))
        answer = await connection.ask(asked("key-of-search", [f"{number} {' '.join(WORDS * 10)}"]))
        connection.close()
        assert answer.status == 200, answer
        return answer.seconds

    tasks = []
    while time.monotonic() < end:
        tasks.append(asyncio.create_task(one(len(tasks))))
        await asyncio.sleep(dice.expovariate(RATE))
    return await asyncio.gather(*tasks)


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def test_a_flood_of_one_key_is_hardly_noticed_by_another(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("bulk:key-of-the-flood\nsearch:key-of-search\n")
    options = (*OPTIONS, "--api-key-file", str(tmp_path / "keys"))
    env = {"FAKE_SECONDS": str(BATCH_S)}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:

        async def run() -> tuple[list[float], list[float]]:
            alone = await search(server)
            stop = asyncio.Event()
            floods = [asyncio.create_task(flood(server, stop, seed)) for seed in range(FLOODING)]
            await asyncio.to_thread(
                server.wait_until, lambda: server.metric("nv_embed_queued_tokens") > 6e4, "full"
            )
            await asyncio.sleep(2)  # the first surge is over
            looking = asyncio.create_task(queued(server, stop))
            beside = await search(server)
            stop.set()
            seen = await looking
            assert max(seen) < 1.6e5, "the flood has no more than its share"
            assert statistics.median(seen) > 3e4, "and it is one"
            for task in floods:
                task.cancel()
            await asyncio.gather(*floods, return_exceptions=True)
            await asyncio.sleep(0)  # their connections close
            return alone, beside

        alone, beside = asyncio.run(run())
        print(f"p99 alone {p99(alone):.3f} s, beside the flood {p99(beside):.3f} s; {len(beside)}")
        assert p99(beside) <= 2 * p99(alone)
        assert server.metric('nv_embed_refused_requests_total{reason="key_share"}') > 0
        assert server.metric('nv_embed_refused_requests_total{reason="queue"}') == 0
        assert server.metric('nv_embed_key_tokens_total{key="search"}') > len(beside)
