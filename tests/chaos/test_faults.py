"""A real server, broken on purpose. Every request is accounted for: answered, or failed with a
cause.

Short by default; `make chaos` sets CHAOS=full for the long form.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.processes import ServerProcess, serving
from tests.server.questions import (
    RUNNERS,
    Questions,
    ask,
    assert_answers,
    client_of,
    logged_batches,
    marked_ids,
)

FULL = os.environ.get("CHAOS") == "full"
REQUESTS = 5000 if FULL else 400
KILL_EVERY_S = 5.0 if FULL else 0.7
BATCH_S = "0.1" if FULL else "0.05"
CONNECTIONS = 64


async def ask_all(server: ServerProcess, requests: list) -> list[httpx.Response]:
    """At most CONNECTIONS at a time, retried as an SDK would while no worker is ready."""
    gate = asyncio.Semaphore(CONNECTIONS)

    async def one(client: httpx.AsyncClient, inputs: object) -> httpx.Response:
        async with gate:
            while True:
                answer = await ask(client, inputs)
                if answer.status_code != 503:
                    return answer
                await asyncio.sleep(0.2)

    async with client_of(server) as client:
        return await asyncio.gather(*(one(client, inputs) for inputs, _ in requests))


def test_workers_killed_at_random_lose_no_answer(golden_checkpoint: Path, tmp_path: Path) -> None:
    questions, dice = Questions(golden_checkpoint, seed=11), random.Random(12)
    requests = [questions.request() for _ in range(REQUESTS)]
    options = ("--runner", RUNNERS + "Hashing", "--devices", "cpu,cpu", "--no-access-log")
    env = {"FAKE_SECONDS": BATCH_S}

    async def run(server: ServerProcess) -> tuple[list[httpx.Response], int]:
        asking = asyncio.create_task(ask_all(server, requests))
        kills = 0
        while not (await asyncio.wait({asking}, timeout=KILL_EVERY_S))[0]:
            # Only a ready one, as the issue of a fault in service is at stake, not of the start.
            if await asyncio.to_thread(server.metric, "nv_embed_workers_ready") == 2:
                os.kill(dice.choice(server.worker_pids()), signal.SIGKILL)
                kills += 1
        return asking.result(), kills

    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)
        answers, kills = asyncio.run(run(server))
        for answer, (_, ids) in zip(answers, requests, strict=True):
            assert_answers(answer, ids)
        assert kills >= 2
        server.wait_for_metric('nv_embed_worker_deaths_total{cause="crash"}', kills)
        assert server.metric("nv_embed_worker_deaths_total") == kills


@pytest.mark.parametrize(
    ("runner", "code", "options"),
    [
        ("Dying", "batch_failed", ()),
        # A busy machine reaches this limit without a fault.
        pytest.param(
            "Hanging", "batch_failed", ("--hang-timeout", "0.5"), marks=pytest.mark.timing
        ),
        ("NotANumber", "non_finite_vector", ()),
    ],
)
def test_a_poison_input_among_500_requests(
    golden_checkpoint: Path, tmp_path: Path, runner: str, code: str, options: tuple[str, ...]
) -> None:
    """499 answers, one 500, the server up; and the same input again costs no worker."""
    questions = Questions(golden_checkpoint, seed=13)
    requests = [questions.request() for _ in range(499)]
    requests.insert(250, ([marked_ids()], [marked_ids()]))
    options = ("--runner", RUNNERS + runner, "--devices", "cpu,cpu", "--no-access-log", *options)
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)
        answers = asyncio.run(ask_all(server, requests))
        for index, (answer, (_, ids)) in enumerate(zip(answers, requests, strict=True)):
            if index == 250:
                assert answer.status_code == 500
                assert answer.headers["x-should-retry"] == "false"
                assert answer.json()["error"]["code"] == code
                assert answer.json()["error"]["param"] == "input[0]"
            else:
                assert_answers(answer, ids)
        server.wait_for_metric("nv_embed_workers_ready", 2)
        deaths = server.metric("nv_embed_worker_deaths_total")
        assert server.metric("nv_embed_non_finite_vectors_total") == (runner == "NotANumber")
        assert server.metric("nv_embed_quarantined_inputs_total") == (runner != "NotANumber")
        started = time.monotonic()
        again = server.embed(input=marked_ids())
        assert again.status_code == 500
        assert time.monotonic() - started < 5
        assert server.metric("nv_embed_worker_deaths_total") == deaths
        assert_answers(server.embed(input=[[1, 315, 2]]), [[1, 315, 2]])


@pytest.mark.timing
def test_a_first_batch_that_hangs_is_ended_as_soon_as_any_other(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Nothing was measured yet. Two workers die over it until it is found to be the cause."""
    options = ("--runner", RUNNERS + "Hanging", "--hang-timeout", "1")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        started = time.monotonic()
        assert server.embed(input=marked_ids()).status_code == 500
        assert 2 <= time.monotonic() - started < 8
        # Counted once it is known how the process ended, which is a moment after the answer.
        server.wait_for_metric('nv_embed_worker_deaths_total{cause="hang"}', 2)
        assert server.metric("nv_embed_quarantined_inputs_total") == 1


@pytest.mark.timing
def test_stopped_workers_cost_no_answer(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Stopped when idle, and at work while the server drains."""
    ids = [[[1, 300 + number, 2]] for number in range(8)]
    options = ("--runner", RUNNERS + "Hashing", "--devices", "cpu,cpu", "--hang-timeout", "0.7")
    options += ("--max-batch-seqs", "1")
    batches = tmp_path / "batches"
    env = {"FAKE_SECONDS": "0.2", "FAKE_BATCH_LOG": str(batches)}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)

        os.kill(server.worker_pids()[0], signal.SIGSTOP)
        answers = asyncio.run(ask_all(server, list(zip(ids, ids, strict=True))))
        for answer, own in zip(answers, ids, strict=True):
            assert_answers(answer, own)
        server.wait_for_metric("nv_embed_workers_ready", 2)
        assert server.metric("nv_embed_worker_deaths_total") >= 1

        with ThreadPoolExecutor() as threads:
            done = len(logged_batches(batches))
            asking = threads.submit(lambda: server.embed(input=ids[0]))
            server.wait_until(lambda: len(logged_batches(batches)) > done, "at work")
            os.kill(logged_batches(batches)[-1]["pid"], signal.SIGSTOP)
            server.process.send_signal(signal.SIGTERM)
            assert_answers(asking.result(), ids[0])


def test_an_input_beyond_the_devices_memory_is_a_400(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Batches are halved until they fit; only what does not fit alone is refused."""
    questions = Questions(golden_checkpoint, seed=14)
    requests = [questions.request() for _ in range(100)]
    options = ("--runner", RUNNERS + "Cramped", "--no-access-log")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        answers = asyncio.run(ask_all(server, requests))
        log = server.log
        assert server.metric("nv_embed_out_of_memory_splits_total") > 0
    refused = 0
    for answer, (_, ids) in zip(answers, requests, strict=True):
        if max(map(len, ids)) <= 64:
            assert_answers(answer, ids)
        else:
            refused += 1
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "input_too_large"
    assert 0 < refused < 100
    assert "from now on at most" in log
