"""Clients that disconnect at any moment, and memory that runs out: the others are answered, and
nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from pathlib import Path

import httpx

from tests.chaos.load import address, post
from tests.chaos.test_faults import FULL, ask_all
from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS, Questions, assert_answers, marked_ids

VANISHING = 2000 if FULL else 300
STAYING = 1000 if FULL else 150
AT_ONCE = 50
GAUGES = [
    "waiting_requests",
    "running_requests",
    "queued_inputs",
    "queued_tokens",
    "inflight_bytes",
]


async def vanish(host: str, port: int, request: bytes, dice: random.Random) -> None:
    """Leave with the request half sent, while waiting, or with the answer half read."""
    moment = dice.choice(["sending", "waiting", "reading"])
    reader, writer = await asyncio.open_connection(host, port, limit=1024)
    if moment == "sending":
        writer.write(request[: dice.randrange(len(request))])
        await asyncio.sleep(dice.uniform(0, 0.1))
    else:
        writer.write(request)
        await asyncio.sleep(dice.uniform(0, 0.3) if moment == "waiting" else 0)
        if moment == "reading":
            await reader.read(dice.randint(1, 500))
    if dice.random() < 0.5:  # a reset, not a farewell
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()
    else:
        writer.close()


async def vanish_often(server: ServerProcess, questions: Questions) -> None:
    dice, gate = random.Random(52), asyncio.Semaphore(AT_ONCE)

    async def one(inputs: object) -> None:
        body = json.dumps({"model": "golden-embed", "input": inputs}).encode()
        async with gate:
            await vanish(*address(server), post(body), dice)

    await asyncio.gather(*(one(questions.request()[0]) for _ in range(VANISHING)))


def test_vanishing_clients_harm_nobody_and_leave_nothing(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    questions = Questions(golden_checkpoint, seed=51)
    requests = [questions.request() for _ in range(STAYING)]
    options = ("--runner", RUNNERS + "Hashing", "--devices", "cpu,cpu", "--no-access-log")

    async def run(server: ServerProcess) -> list[httpx.Response]:
        leaving = asyncio.create_task(vanish_often(server, questions))
        answers = await ask_all(server, requests)
        await leaving
        return answers

    log, env = tmp_path / "log", {"FAKE_SECONDS": "0.05"}
    with serving(golden_checkpoint, *options, log=log, env=env) as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)
        assert server.embed(input="x").status_code == 200  # what is made once, is made
        files, tasks = server.metric("process_open_fds"), server.metric("nv_embed_event_loop_tasks")
        for answer, (_, ids) in zip(asyncio.run(run(server)), requests, strict=True):
            assert_answers(answer, ids)
        for gauge in GAUGES:
            server.wait_for_metric(f"nv_embed_{gauge}", 0)
        server.wait_for_metric("process_open_fds", files)
        server.wait_for_metric("nv_embed_event_loop_tasks", tasks)
        assert server.metric("nv_embed_cancelled_requests_total") > VANISHING / 10
        assert server.metric("nv_embed_worker_deaths_total") == 0


def test_bodies_beyond_the_byte_budget_are_refused_and_given_back(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Forty bodies of 100 kB at once where 1 MB is allowed: 200 or 429, then all is well."""
    body = json.dumps({"model": "golden-embed", "input": ["word " * 200] * 100})
    options = ("--runner", RUNNERS + "Hashing", "--max-inflight-bytes", "1000000")

    async def flood(server: ServerProcess) -> list[httpx.Response]:
        headers = {"content-type": "application/json"}
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            posts = (
                client.post("/v1/embeddings", content=body, headers=headers) for _ in range(40)
            )
            return await asyncio.gather(*posts)

    log, env = tmp_path / "log", {"FAKE_SECONDS": "0.05"}
    with serving(golden_checkpoint, *options, log=log, env=env) as server:
        answers = asyncio.run(flood(server))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == "rate_limit_exceeded"
                assert answer.headers["retry-after-ms"]
        server.wait_for_metric("nv_embed_inflight_bytes", 0)
        assert server.embed(input=["word " * 200] * 100).status_code == 200


def test_a_worker_without_memory_dies_or_says_so_and_comes_back(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Address space for 64 MB beyond what it starts with; a marked input asks for a gigabyte."""
    questions = Questions(golden_checkpoint, seed=53)
    requests = [questions.request() for _ in range(60)]
    options = ("--runner", RUNNERS + "Greedy", "--no-access-log")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        requests.insert(30, ([marked_ids()], [marked_ids()]))
        answers = asyncio.run(ask_all(server, requests))
        for index, (answer, (_, ids)) in enumerate(zip(answers, requests, strict=True)):
            if index == 30:
                assert answer.status_code in (400, 500), answer.text
                assert answer.json()["error"]["code"] in ("input_too_large", "batch_failed")
            else:
                assert_answers(answer, ids)
        assert server.client.get("/readyz").status_code == 200
