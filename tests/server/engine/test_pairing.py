"""Each answer belongs to its question, whatever happens around it.

Real server, real sockets; the runner's vector is computed from the ids (tests/server/runners.py).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import httpx
import pytest

from tests.server.processes import ServerProcess, serving
from tests.server.questions import (
    RUNNERS,
    WORDS,
    Questions,
    ask,
    assert_answers,
    batches_logged,
    client_of,
    logged_batches,
    marked_ids,
)
from tests.server.runners import key_of

pytestmark = pytest.mark.process


def test_400_concurrent_requests_of_which_100_are_cancelled(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    questions = Questions(golden_checkpoint, seed=1)
    requests = [questions.request() for _ in range(400)]
    cancelled = set(random.Random(2).sample(range(400), 100))
    batch_log = tmp_path / "batches"

    async def run(server: ServerProcess) -> None:
        async with client_of(server) as client:
            tasks = [asyncio.create_task(ask(client, inputs)) for inputs, _ in requests]
            await batches_logged(batch_log, 4)  # some are answered, some out, some queued
            for index in cancelled:
                tasks[index].cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
        for index, (answer, (_, ids)) in enumerate(zip(answers, requests, strict=True)):
            if isinstance(answer, httpx.Response):
                assert_answers(answer, ids)
            else:
                assert isinstance(answer, asyncio.CancelledError), repr(answer)
                assert index in cancelled

    env = {"FAKE_BATCH_LOG": str(batch_log), "FAKE_SECONDS": "0.05"}
    options = ("--runner", RUNNERS + "Hashing", "--devices", "cpu,cpu")
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        asyncio.run(run(server))
        # And afterwards nothing is left behind.
        for name in ("queued_tokens", "queued_inputs", "waiting_requests", "running_requests"):
            server.wait_for_metric(f"nv_embed_{name}", 0)
        assert 0 < server.metric("nv_embed_cancelled_requests_total") <= 100


def test_only_the_requests_of_a_failed_batch_fail(golden_checkpoint: Path, tmp_path: Path) -> None:
    questions = Questions(golden_checkpoint, seed=3)
    requests = [questions.request() for _ in range(200)]
    requests.insert(100, ([marked_ids()], [marked_ids()]))
    batch_log = tmp_path / "batches"
    server = ServerProcess(
        golden_checkpoint,
        *("--runner", RUNNERS + "Failing"),
        log=tmp_path / "log",
        env={"FAKE_BATCH_LOG": str(batch_log), "FAKE_SECONDS": "0.005"},
    ).wait_ready()

    async def run() -> list[httpx.Response]:
        async with client_of(server) as client:
            return await asyncio.gather(*(ask(client, inputs) for inputs, _ in requests))

    answers = asyncio.run(run())
    failed_keys: set[int] = set()
    for batch in logged_batches(batch_log):
        if key_of(marked_ids()) in batch["keys"]:
            failed_keys |= set(batch["keys"])
    failed = 0
    for answer, (_, ids) in zip(answers, requests, strict=True):
        if answer.status_code == 200:
            assert_answers(answer, ids)
        else:
            failed += 1
            assert answer.status_code == 500
            assert answer.headers["x-should-retry"] == "false"
            assert answer.json()["error"]["code"] == "batch_failed"
            assert failed_keys & {key_of(i) for i in ids}, "it had no input in the failed batch"
    assert 1 <= failed < 100
    assert "the mark was seen" not in "".join(answer.text for answer in answers)
    assert server.stop() == 0


def test_a_nan_fails_its_own_request_only(golden_checkpoint: Path, tmp_path: Path) -> None:
    questions = Questions(golden_checkpoint, seed=4)
    requests = [questions.request() for _ in range(50)]
    requests.insert(25, ([[1, 315, 2], marked_ids()], [[1, 315, 2], marked_ids()]))

    async def run(server: ServerProcess) -> list[httpx.Response]:
        async with client_of(server) as client:
            return await asyncio.gather(*(ask(client, inputs) for inputs, _ in requests))

    options = ("--runner", RUNNERS + "NotANumber")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        answers = asyncio.run(run(server))
    for index, (answer, (_, ids)) in enumerate(zip(answers, requests, strict=True)):
        if index == 25:
            assert answer.status_code == 500
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("non_finite_vector", "input[1]")
        else:
            assert_answers(answer, ids)


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_a_killed_worker_loses_no_answer(
    golden_checkpoint: Path, tmp_path: Path, devices: str
) -> None:
    """Both workers are busy; one is killed with batches out; the order still holds."""
    questions = Questions(golden_checkpoint, seed=5)
    bulk = [f"document number {index}, one of many" for index in range(2048)]
    requests = [(bulk, [questions.ids(text) for text in bulk])]
    requests += [questions.request() for _ in range(40)]
    batch_log = tmp_path / "batches"

    async def run(server: ServerProcess) -> list[httpx.Response]:
        async with client_of(server) as client:
            tasks = [asyncio.create_task(ask(client, inputs)) for inputs, _ in requests]
            await batches_logged(batch_log, 6)
            os.kill(first_pids[0], signal.SIGKILL)
            return await asyncio.gather(*tasks)

    env = {"FAKE_BATCH_LOG": str(batch_log), "FAKE_SECONDS": "0.05"}
    options = ("--runner", RUNNERS + "Hashing", "--devices", devices)
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        count = len(devices.split(","))
        server.wait_for_metric("nv_embed_workers_ready", count)
        first_pids = server.worker_pids()
        assert len(first_pids) == count
        answers = asyncio.run(run(server))
        for answer, (_, ids) in zip(answers, requests, strict=True):
            assert_answers(answer, ids)
        server.wait_for_metric("nv_embed_workers_ready", count)
        assert server.metric("nv_embed_worker_deaths_total") == 1
    batches = logged_batches(batch_log)
    busy = {batch["pid"] for batch in batches[:6]}
    assert busy == set(first_pids), "every worker was busy before one was killed"
    after = {batch["pid"] for batch in batches} - {first_pids[0]}
    assert after, "another worker finished the work"


def test_an_input_that_kills_workers_fails_alone_in_the_end(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    with serving(
        golden_checkpoint, *("--runner", RUNNERS + "Dying"), log=tmp_path / "log"
    ) as server:
        answer = server.embed(input=marked_ids())
        assert answer.status_code == 500
        assert answer.headers["x-should-retry"] == "false"
        server.wait_ready()
        assert_answers(server.embed(input=[[1, 315, 2]]), [[1, 315, 2]])


def test_a_query_does_not_wait_behind_a_bulk_request(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """With 2,048 inputs queued, it runs in the next batch or the one after."""
    questions = Questions(golden_checkpoint, seed=6)
    bulk = [" ".join([f"document {index}"] + WORDS * 3) for index in range(2048)]
    query = "what is the answer?"
    batch_log = tmp_path / "batches"

    async def run(server: ServerProcess) -> list[int]:
        waits = []
        async with client_of(server) as client:
            whole = asyncio.create_task(ask(client, bulk))
            await batches_logged(batch_log, 1)
            for number in range(5):
                text = f"{query} {number}"
                started = len(logged_batches(batch_log))
                assert_answers(await ask(client, [text]), [questions.ids(text)])
                key = key_of(questions.ids(text))
                batches = logged_batches(batch_log)
                ran = next(i for i, batch in enumerate(batches) if key in batch["keys"])
                waits.append(ran - (started - 1))  # 0 would be the batch that was running
            assert not whole.done(), "the bulk request must still be in the queue"
            assert_answers(await whole, [questions.ids(text) for text in bulk])
        return waits

    env = {"FAKE_BATCH_LOG": str(batch_log), "FAKE_SECONDS": "0.1"}
    options = ("--runner", RUNNERS + "Hashing")
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        waits = asyncio.run(run(server))
    assert set(waits) <= {1, 2}, waits
