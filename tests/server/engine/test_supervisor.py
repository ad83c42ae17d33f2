"""Real worker processes that do what none should, under a supervisor whose events are recorded."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from model.batch import Encoding, RunnerOptions
from server.engine.supervisor import Supervisor, load_timeout_of
from server.engine.wire import HEADER, Fault, Kind, frame
from server.engine.worker_link import Worker
from server.errors import StartError
from tests.server.processes import ROOT, is_running
from tests.server.questions import RUNNERS, marked_ids
from tests.server.runners import WIDTH, vector_of

pytestmark = pytest.mark.process

POISON = Encoding(np.array(marked_ids(), dtype=np.int32))


@dataclass
class Events:
    """Remembers; `fails` names the handlers that raise, once each."""

    fails: set[str] = field(default_factory=set)
    seen: list[str] = field(default_factory=list)
    ready: list[Worker] = field(default_factory=list)
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    ends: list[str | None] = field(default_factory=list)
    splits: int = 0

    def _note(self, event: str) -> None:
        self.seen.append(event)
        if event in self.fails:
            self.fails.remove(event)
            raise KeyError("a fault of ours")

    def worker_ready(self, worker: Worker) -> None:
        self.ready.append(worker)
        self._note("ready")

    def worker_lost(self, worker: Worker) -> None:
        self.ready.remove(worker)
        self._note("lost")

    def batch_done(
        self, worker: Worker, batch_id: int, rows: np.ndarray, faults: dict[int, Fault]
    ) -> None:
        self.rows[batch_id] = rows
        self._note("done")

    def batch_failed(self, worker: Worker, batch_id: int) -> None:
        self._note("failed")

    def memory_told(self, worker: Worker, splits: int, device_bytes: int) -> None:
        self.splits += splits

    def worker_ended(self, cause: str | None) -> None:
        self.ends.append(cause)

    async def until(self, predicate: Callable[[Events], bool], seconds: float = 15) -> None:
        async with asyncio.timeout(seconds):
            while not predicate(self):  # noqa: ASYNC110
                await asyncio.sleep(0.01)


Test = Callable[[Supervisor, Events], Awaitable[None]]


def supervised(
    test: Test, runner: str, *, workers: int = 1, events: Events | None = None, timeout: float = 60
) -> Supervisor:
    """Run `test` against workers; in the end the supervisor must stop in time."""
    events = events or Events()
    options = [RunnerOptions(path=f"{slot}", device="cpu") for slot in range(workers)]

    async def run() -> Supervisor:
        supervisor = Supervisor(
            options, events, runner=RUNNERS + runner, width=WIDTH, load_timeout=timeout
        )
        supervisor.start()
        try:
            await test(supervisor, events)
        finally:
            async with asyncio.timeout(60):
                await supervisor.stop()
        return supervisor

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers find the tests' runners, and the trouble is still to be made."""
    once = tmp_path / "once"
    once.mkdir()
    for slot in range(10):
        (once / f"{slot}").touch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAKE_ONCE", str(once))
    return once


def assert_answer(events: Events, batch_id: int, encoding: Encoding = POISON) -> None:
    np.testing.assert_array_equal(events.rows[batch_id], [vector_of(encoding.ids)])


# Loading


def test_a_worker_that_stops_while_it_loads_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: bool(supervisor.trouble))
        await events.until(lambda events: "took too long" in supervisor.trouble.get(0, ""))
        await events.until(lambda events: events.seen == ["ready"])

    # Half of what a start takes on a busy machine is enough at a later try: each has more.
    events = Events()
    supervised(test, "StoppedWhileLoading", timeout=2, events=events)
    assert events.ends[0] is None, "it was never ready"
    assert "worker 0 was not ready after 2 s: ending it" in caplog.text


def test_large_checkpoints_have_longer_to_load() -> None:
    small, true_size = load_timeout_of(30_000_000), load_timeout_of(15_700_000_000)
    assert 60 <= small < 65
    assert 600 < true_size < 1200, "15.7 GB load in 19 to 33 s from a local disk"


def test_greetings_that_are_none_cost_their_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    says = [
        b"Traceback (most recent call last): and so on, at length",
        frame(Kind.HELLO, b"{"),
        frame(Kind.HELLO, b"[]"),
        frame(Kind.HELLO, b'{"info": {"colour": "red"}, "tokens_per_s": 0}'),
        frame(Kind.HELLO, b'{"info": {}, "tokens_per_s": "fast"}'),
        frame(Kind.REFUSED, b'"no"'),
        frame(Kind.ROWS, b"", batch_id=1),
        HEADER.pack(Kind.HELLO, 0, 0, 0, (1 << 32) - 1),
    ]
    monkeypatch.setenv("FAKE_SAYS", rambling(says))

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: len(events.ready) == len(says))
        assert supervisor.trouble == {}

    supervised(test, "Rambling", workers=len(says))
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 2 * len(says), "of each what was wrong, and that it ended"
    assert not any(record.exc_info for record in errors)


def rambling(says: list[bytes]) -> str:
    return json.dumps({f"{slot}": data.hex() for slot, data in enumerate(says)})


def test_vectors_of_a_wrong_width_end_the_start() -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        async with asyncio.timeout(15):
            with pytest.raises(StartError, match=r"vectors have 32 values, and config.json says"):
                await supervisor.failed()
        assert events.seen == []

    supervised(test, "Narrow")


def test_a_worker_that_cannot_be_loaded_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "orjson.py").write_text("raise MemoryError('no\\nmore')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: "ended (status 71)" in supervisor.trouble.get(0, ""))

    supervised(test, "Hashing")
    said = capfd.readouterr().err
    assert "the worker cannot be loaded: no\n" in said
    assert "Traceback" not in said


def test_without_files_or_processes_it_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.engine import worker_process as module

    spawn, refusals = module._spawn, [BlockingIOError(11, "Resource temporarily unavailable")]

    def refuse_once(fd: int, environment: dict[str, str]) -> object:
        if refusals:
            raise refusals.pop()
        return spawn(fd, environment)

    monkeypatch.setattr(module, "_spawn", refuse_once)

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: "cannot be started" in supervisor.trouble.get(0, ""))
        await events.until(lambda events: events.seen == ["ready"])

    supervised(test, "Hashing")


def test_without_threads_it_says_so_in_a_line_and_tries_again(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: events.seen == ["ready"])

    supervised(test, "WithoutThreads")
    assert "worker 0 cannot start: can't start new thread, for want of processes" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


# Answers


def test_answers_that_are_none_cost_their_workers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one_row, wrong_fault = bytes(4 * WIDTH), b"\x00\x00\x00\x00\x63\x00\x00\x00"
    says = [
        b"\x00" * 64,
        frame(Kind.HELLO, b"{}"),
        frame(Kind.ROWS, one_row, batch_id=2, rows=1),
        frame(Kind.ROWS, one_row, batch_id=1, rows=2),
        frame(Kind.ROWS, one_row * 2, batch_id=1, rows=1),
        frame(Kind.ROWS, one_row + wrong_fault * 2, batch_id=1, rows=1, faults=2),
        frame(Kind.ROWS, one_row + wrong_fault, batch_id=1, rows=1, faults=1),
        HEADER.pack(Kind.FAILED, 1, 0, 0, (1 << 32) - 1),
    ]
    monkeypatch.setenv("FAKE_SAYS", rambling(says))

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: len(events.ready) == len(says))
        for worker in list(events.ready):
            worker.send(1, [POISON])
        await events.until(lambda events: events.seen.count("lost") == len(says))
        await events.until(lambda events: len(events.ready) == len(says))
        assert not events.rows
        for worker in events.ready:
            worker.send(10 + worker.slot, [POISON])
        await events.until(lambda events: len(events.rows) == len(says))
        for slot in range(len(says)):
            assert_answer(events, 10 + slot)

    events = Events()
    supervised(test, "RamblingOnMark", workers=len(says), events=events)
    assert events.ends == ["nonsense"] * len(says)
    assert not any(record.exc_info for record in caplog.records)


def test_a_second_answer_is_never_taken() -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: events.seen == ["ready"])
        events.ready[0].send(1, [POISON])
        await events.until(lambda events: "lost" in events.seen)
        assert events.seen[:3] == ["ready", "done", "lost"]
        assert_answer(events, 1)
        await events.until(lambda events: events.seen[3:] == ["ready"])

    supervised(test, "AnswersTwice")


# Handlers


@pytest.mark.parametrize("event", ["ready", "lost", "done", "failed"])
def test_a_fault_in_a_handler_ends_its_worker_and_nothing_else(
    event: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        failing = asyncio.create_task(supervisor.failed())
        await events.until(lambda events: events.seen.count("ready") >= 2)
        events.fails = {event}
        if event == "ready" or event == "lost":
            os.kill(events.ready[0]._process.pid, signal.SIGKILL)
        else:
            mark = POISON if event == "failed" else Encoding(np.array([1, 7, 2], dtype=np.int32))
            events.ready[0].send(1, [mark])
        await events.until(lambda events: not events.fails)
        await events.until(lambda events: len(events.ready) == 2)
        for worker in events.ready:
            worker.send(2 + worker.slot, [Encoding(np.array([1, 5, 2], dtype=np.int32))])
        await events.until(lambda events: events.rows.keys() >= {2, 3})
        assert not failing.done()
        failing.cancel()

    supervised(test, "Failing", workers=2)
    assert caplog.text.count("an event could not be handled") == 1


# Ending


def test_a_worker_that_cannot_be_killed_is_lost_at_once_and_does_not_hold_the_stop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in the kernel's uninterruptible sleep, when a GPU falls off the bus."""
    immortal: list[subprocess.Popen[bytes]] = []

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: events.seen == ["ready"])
        worker = events.ready[0]
        make_immortal(worker)
        worker.send(1, [POISON])
        await asyncio.sleep(0.1)
        worker.kill()
        await events.until(lambda events: events.seen == ["ready", "lost"], seconds=0.5)
        worker.send(2, [POISON])  # before whoever hands over has heard of it
        await events.until(lambda events: supervisor.trouble.get(0) == "its worker is ending", 1)
        await events.until(lambda events: len(events.ready) == 1, 30)
        events.ready[0].send(3, [POISON])
        await events.until(lambda events: 3 in events.rows)
        # And the same while the supervisor stops.
        make_immortal(events.ready[0])
        os.kill(events.ready[0]._process.pid, signal.SIGSTOP)

    def make_immortal(worker: Worker) -> None:
        worker._process.kill = lambda: None
        immortal.append(worker._process)

    try:
        supervised(test, "HangsOnce")
        assert "worker 0 ended (killed, and it does not end)" in caplog.text
        assert caplog.text.count("worker 0 cannot be killed: its device may have to be reset") == 2
        assert all(is_running(process.pid) for process in immortal)
    finally:
        for process in immortal:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def test_a_stopped_worker_does_not_hold_the_stop() -> None:
    pids: list[int] = []

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: events.seen == ["ready"])
        pids.append(events.ready[0]._process.pid)
        os.kill(pids[0], signal.SIGSTOP)
        large = Encoding(np.full(30_000, 7, dtype=np.int32))
        events.ready[0].send(1, [large] * 40)  # more than its socket takes

    supervised(test, "Hashing")
    assert not is_running(pids[0])


# What can never start


def write_starts(folder: Path, *starts: str) -> None:
    """What becomes of each slot's starts, separated by commas."""
    folder.mkdir()
    for slot, lines in enumerate(starts):
        (folder / f"{slot}").write_text(lines.replace(", ", "\n"))


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for `write_starts`; a failed start is tried again at once."""
    monkeypatch.setattr("server.engine.supervisor._BACKOFF_S", (0.0,))
    monkeypatch.setenv("FAKE_STARTS", str(tmp_path / "starts"))
    return tmp_path / "starts"


def ends_with(message: str, workers: int = 1) -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        async with asyncio.timeout(30):
            with pytest.raises(StartError, match=message):
                await supervisor.failed()
        assert events.seen == []

    supervised(test, "Starting", workers=workers)


def becomes_ready(workers: int = 1, times: int = 1) -> None:
    async def test(supervisor: Supervisor, events: Events) -> None:
        failing = asyncio.create_task(supervisor.failed())
        await events.until(lambda events: events.seen.count("ready") == workers * times, 30)
        assert not failing.done()
        failing.cancel()

    supervised(test, "Starting", workers=workers)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no kernel image is available", r"RuntimeError\('no kernel image.*3 times in a row"),
        ("exit 71", r"ended before it was ready \(status 71\)"),
        (f"signal {int(signal.SIGSEGV)}", r"ended before it was ready \(signal 11\)"),
    ],
)
def test_the_same_failure_three_times_ends_the_start(starts: Path, line: str, message: str) -> None:
    write_starts(starts, ", ".join([line] * 5))
    ends_with(message)
    assert len((starts / "0").read_text().splitlines()) == 2, "three starts and no more"


def test_a_message_with_other_numbers_is_the_same(starts: Path) -> None:
    write_starts(starts, "at 0x7f3a 12 MB, at 0x55cc 13 MB, at 0x9 1 MB")
    ends_with("at 0x9 1 MB")


@pytest.mark.parametrize(
    "lines",
    ["one, two, one, two", "one, one, two, two", "one, one, signal 9, one, one", "one, one"],
)
def test_failures_for_different_reasons_are_tried_again(starts: Path, lines: str) -> None:
    write_starts(starts, lines)
    becomes_ready()


@pytest.mark.parametrize("line", [f"signal {int(signal.SIGKILL)}", "no thread"])
def test_what_others_do_to_a_worker_is_no_reason_to_give_up(starts: Path, line: str) -> None:
    write_starts(starts, ", ".join([line] * 4))
    becomes_ready()


def test_a_device_that_cannot_start_does_not_end_those_that_still_load(starts: Path) -> None:
    """The second is killed in its starts for longer than the first needs to fail for good."""
    write_starts(starts, ", ".join(["broken"] * 500), "signal 9, signal 9, signal 9, signal 9")

    async def test(supervisor: Supervisor, events: Events) -> None:
        failing = asyncio.create_task(supervisor.failed())
        await events.until(lambda events: events.seen == ["ready"], 30)
        assert events.ready[0].slot == 1
        assert not failing.done()
        failing.cancel()

    supervised(test, "Starting", workers=2)


def test_several_devices_end_the_start_when_none_can(starts: Path) -> None:
    write_starts(starts, "broken, " * 4, "torn, " * 4)
    ends_with("broken.*; .*torn", workers=2)


def test_once_it_has_served_a_worker_is_tried_for_ever(starts: Path) -> None:
    write_starts(starts, "")

    async def test(supervisor: Supervisor, events: Events) -> None:
        failing = asyncio.create_task(supervisor.failed())
        await events.until(lambda events: events.seen == ["ready"])
        (starts / "0").write_text("broken\n" * 4)
        os.kill(events.ready[0]._process.pid, signal.SIGKILL)
        await events.until(lambda events: events.seen == ["ready", "lost", "ready"], 40)
        assert (starts / "0").read_text() == ""
        assert not failing.done()
        failing.cancel()

    supervised(test, "Starting")


def test_a_new_worker_chooses_what_the_last_one_chose(environment: Path) -> None:
    """Otherwise a text could have other numbers after a restart. If that cannot be had any more,
    it chooses anew."""
    (environment / "0").unlink()

    async def next_choice(events: Events) -> tuple[str, dict[str, str]]:
        starts = events.seen.count("ready")
        os.kill(events.ready[0]._process.pid, signal.SIGKILL)
        await events.until(lambda events: events.seen.count("ready") > starts)
        info = events.ready[0].info
        return info.dtype, info.products

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: events.seen == ["ready"])
        first = events.ready[0].info
        assert await next_choice(events) == (first.dtype, first.products)
        assert await next_choice(events) == (first.dtype, first.products)
        (environment / "0").touch()
        _, anew = await next_choice(events)
        assert anew == {"float32": f"chance {events.ready[0]._process.pid}"}

    supervised(test, "Choosing")


def test_a_worker_that_cannot_be_executed_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, starts: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    ends_with("a worker cannot be started: .*No such file.*/nonexistent/python")


# Devices


@pytest.mark.parametrize("device", ["well", "dead"])
def test_after_an_unexpected_error_the_device_is_asked(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether it can still be used, the error does not tell. The batch of a dead one is not failed:
    another device may do it."""
    monkeypatch.setenv("FAKE_GPU", device)

    async def test(supervisor: Supervisor, events: Events) -> None:
        await events.until(lambda events: events.seen == ["ready"])
        events.ready[0].send(1, [POISON])
        then = ["failed"] if device == "well" else ["lost", "ready"]
        await events.until(lambda events: events.seen == ["ready", *then])

    events = Events()
    supervised(test, "FailingOnCuda", events=events)
    assert events.ends == ["device"] * (device == "dead")
    assert ("worker 0 ended (status 70) while serving" in caplog.text) == (device == "dead")
