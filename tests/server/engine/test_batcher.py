"""Composition, hand-over, failure: the batcher, with workers that only record."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from model.batch import BatchLimits, Encoding, RunnerInfo
from server.engine import batches_out
from server.engine.batcher import Batcher
from server.engine.metrics import Metrics
from server.engine.pending_answer import PendingAnswer
from server.engine.request_queue import QueuedRequest
from server.engine.vector_cache import VectorCache
from server.engine.wire import Fault
from server.engine.worker_link import Worker
from server.engine.worker_tallies import BUILD
from server.errors import (
    BatchFailedError,
    DeadlineExceededError,
    DeviceMemoryError,
    InternalError,
    NonFiniteVectorError,
    UnavailableError,
)
from tests.server.runners import WIDTH, vector_of


class RecordingWorker(Worker):
    """Answers when it is told to."""

    def __init__(self, batcher: Batcher, device: str, limits: BatchLimits) -> None:
        self.slot, self.limits, self.tokens_per_s = 0, limits, 0.0
        self.info = RunnerInfo(device, "fake", "float32", "none", "fake", WIDTH)
        self.batches: dict[int, list[Encoding]] = {}
        self._batcher = batcher

    def send(self, batch_id: int, encodings: Any) -> None:
        self.batches[batch_id] = list(encodings)

    def answer(self, faults: dict[int, Fault] | None = None) -> None:
        """Finish the oldest batch."""
        batch_id = next(iter(self.batches))
        rows = np.stack([vector_of(encoding.ids) for encoding in self.batches.pop(batch_id)])
        self._batcher.batch_done(self, batch_id, rows, faults or {})

    def kill(self, cause: str = "crash") -> None:
        self.killed_for = cause
        self._batcher.worker_lost(self)

    pid, start_seconds = 1, 2.5

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches.values()]


def metrics_of_one() -> Metrics:
    """Of a server with one place for workers."""
    metrics = Metrics()
    metrics.show_workers(["cpu"], lambda: [("",) * len(BUILD)])
    return metrics


def encoding(number: int, length: int = 5) -> Encoding:
    return Encoding(np.full(length, number, dtype=np.int32))


def encodings(*numbers: int) -> list[Encoding]:
    return [encoding(number) for number in numbers]


def in_loop(test: Callable[[Batcher], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        surprises: list[dict[str, Any]] = []

        async def body() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, what: surprises.append(what))
            await test(Batcher(metrics_of_one()))

        asyncio.run(body())
        gc.collect()  # an error that nobody took is told when its future goes
        assert not surprises

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def turn() -> None:
    """Let the loop turn, so that what was scheduled is composed."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def ready(
    batcher: Batcher, device: str = "cpu", tokens: int = 20, seqs: int = 4
) -> RecordingWorker:
    worker = RecordingWorker(batcher, device, BatchLimits(tokens, seqs))
    batcher.worker_ready(worker)
    return worker


@in_loop
async def test_requests_of_one_turn_share_a_batch(batcher: Batcher) -> None:
    worker = ready(batcher)
    requests = [batcher.submit(encodings(number)) for number in (1, 2, 3)]
    assert not worker.batches, "composed before the turn was over"
    await turn()
    assert worker.sizes == [3]
    worker.answer()
    for number, request in zip((1, 2, 3), requests, strict=True):
        (row,) = await request.answer.future
        np.testing.assert_array_equal(row, vector_of(encoding(number).ids))


@in_loop
async def test_a_cpu_worker_has_one_batch_at_a_time(batcher: Batcher) -> None:
    worker = ready(batcher)
    batcher.submit(encodings(*range(1, 10)))
    await turn()
    assert worker.sizes == [4]
    worker.answer()
    await turn()
    assert worker.sizes == [4]


@in_loop
async def test_a_cuda_worker_gets_a_second_batch_only_when_it_is_full(batcher: Batcher) -> None:
    worker = ready(batcher, "cuda:0")
    batcher.submit(encodings(1, 2))
    await turn()
    batcher.submit(encodings(3, 4, 5))
    await turn()
    assert worker.sizes == [2], "three of four is not full: it may still grow"
    batcher.submit(encodings(6))
    await turn()
    assert worker.sizes == [2, 4]
    batcher.submit(encodings(7, 8, 9, 10))
    await turn()
    assert worker.sizes == [2, 4], "never a third"
    worker.answer()
    await turn()
    assert worker.sizes == [4, 4]


@in_loop
async def test_idle_workers_come_before_second_batches(batcher: Batcher) -> None:
    first, second = ready(batcher, "cuda:0"), ready(batcher, "cuda:1")
    batcher.submit(encodings(*range(1, 9)))
    await turn()
    assert (first.sizes, second.sizes) == ([4], [4])


@in_loop
async def test_a_request_over_two_workers_keeps_its_order(batcher: Batcher) -> None:
    first, second = ready(batcher), ready(batcher)
    request = batcher.submit(encodings(*range(1, 9)))
    await turn()
    second.answer()
    assert not request.answer.done
    first.answer()
    rows = await request.answer.future
    for number, row in zip(range(1, 9), rows, strict=True):
        np.testing.assert_array_equal(row, vector_of(encoding(number).ids))


@in_loop
async def test_a_dropped_request_frees_the_queue_and_its_rows_are_ignored(batcher: Batcher) -> None:
    worker = ready(batcher)
    request = batcher.submit(encodings(*range(1, 10)))
    other = batcher.submit(encodings(20))
    await turn()
    batcher.drop(request)
    assert batcher.queue.num_requests == 0
    worker.answer()
    assert request.answer.future.cancelled()
    assert len(await other.answer.future) == 1


@in_loop
async def test_the_next_batch_goes_out_before_answers_are_written(batcher: Batcher) -> None:
    """Whoever awaits an answer writes it, and the worker is not to wait for that."""
    worker = ready(batcher)
    written = []

    async def write(request: QueuedRequest[PendingAnswer], number: int) -> None:
        await request.answer.future
        written.append((number, worker.sizes))

    requests = [batcher.submit(encodings(number)) for number in range(1, 7)]
    tasks = [asyncio.ensure_future(write(one, n)) for n, one in enumerate(requests)]
    await turn()
    assert worker.sizes == [4]
    worker.answer()
    assert (worker.sizes, written) == ([2], [])
    worker.answer()
    await asyncio.gather(*tasks)
    assert [number for number, _ in written] == list(range(6))


@in_loop
async def test_who_goes_in_the_turn_of_an_answer_leaves_the_others_theirs(batcher: Batcher) -> None:
    """Before it, or after the next batch was composed with him; also with an input in each."""
    worker = ready(batcher)
    first, before, half, last = (
        batcher.submit(encodings(*numbers)) for numbers in ((1, 2), (3, 4), (5, 6, 7), (8, 9))
    )
    await turn()
    assert [encoding.ids[0] for encoding in worker.batches[1]] == [1, 3, 5, 8]
    batcher.drop(before)
    worker.answer()
    batcher.drop(half)
    batcher.drop(first)
    assert [encoding.ids[0] for encoding in worker.batches[2]] == [2, 6, 9, 7]
    assert batcher.queue.num_entries == 0
    worker.answer()
    assert worker.sizes == []
    rows = await last.answer.future
    for number, row in zip((8, 9), rows, strict=True):
        np.testing.assert_array_equal(row, vector_of(encoding(number).ids))
    assert all(one.answer.future.cancelled() for one in (first, before, half))


@in_loop
async def test_a_nan_fails_its_own_request(batcher: Batcher) -> None:
    worker = ready(batcher)
    bad, good = batcher.submit(encodings(1)), batcher.submit(encodings(2))
    await turn()
    worker.answer({0: Fault.NOT_FINITE})
    with pytest.raises(NonFiniteVectorError, match=r"input\[0\]"):
        await bad.answer.future
    assert len(await good.answer.future) == 1


@in_loop
async def test_a_failed_batch_fails_whoever_was_in_it(batcher: Batcher) -> None:
    worker = ready(batcher)
    inside = batcher.submit(encodings(1, 2, 3, 4, 5))
    await turn()
    outside = batcher.submit(encodings(6))
    batcher.batch_failed(worker, next(iter(worker.batches)))
    with pytest.raises(BatchFailedError):
        await inside.answer.future
    await turn()
    worker.batches.pop(next(iter(worker.batches)))
    assert worker.sizes == [1], "the rest of the failed request was dropped"
    worker.answer()
    assert len(await outside.answer.future) == 1


@in_loop
async def test_a_lost_batch_is_served_by_the_next_worker(batcher: Batcher) -> None:
    first = ready(batcher)
    request = batcher.submit(encodings(1, 2, 3, 4, 5))
    await turn()
    batcher.worker_lost(first)
    second = ready(batcher)
    await turn()
    assert [e.ids[0] for e in next(iter(second.batches.values()))] == [1, 2, 3, 4]
    second.answer()
    await turn()
    second.answer()
    assert len(await request.answer.future) == 5


@in_loop
async def test_an_input_too_large_for_the_device_is_the_clients_to_mend(batcher: Batcher) -> None:
    worker = ready(batcher)
    request = batcher.submit(encodings(1, 2))
    await turn()
    worker.answer({1: Fault.NO_MEMORY})
    with pytest.raises(DeviceMemoryError, match=r"input\[1\] has 5 tokens") as caught:
        await request.answer.future
    assert caught.value.status == 400


async def die(batcher: Batcher, expected: list[int]) -> None:
    """A worker gets the next batch, which must be of these inputs, and dies over it."""
    worker = ready(batcher)
    await turn()
    (batch,) = worker.batches.values()
    assert [encoding.ids[0] for encoding in batch] == expected
    batcher.worker_lost(worker)


@in_loop
async def test_after_two_deaths_inputs_run_alone_and_two_more_prove_the_culprit(
    batcher: Batcher,
) -> None:
    good, poison, other = (batcher.submit(encodings(number)) for number in (1, 2, 3))
    await die(batcher, [1, 2, 3])
    await die(batcher, [1, 2, 3])
    survivor = ready(batcher)
    await turn()
    assert survivor.sizes == [1]
    survivor.answer()
    assert len(await good.answer.future) == 1
    await turn()
    batcher.worker_lost(survivor)  # over the second input, alone
    await die(batcher, [2])
    with pytest.raises(BatchFailedError, match=r"input\[0\] made engine workers fail"):
        await poison.answer.future
    last = ready(batcher)
    await turn()
    last.answer()
    assert len(await other.answer.future) == 1
    # It is remembered, so that a retry cannot kill workers in turn.
    with pytest.raises(BatchFailedError):
        batcher.submit(encodings(4, 2))
    batcher.submit(encodings(4))


@in_loop
async def test_copies_of_a_culprit_cost_no_more_workers_than_one(batcher: Batcher) -> None:
    copies = [batcher.submit(encodings(7)) for _ in range(20)]
    await die(batcher, [7])
    copies += [batcher.submit(encodings(7)), batcher.submit(encodings(1, 7))]
    await die(batcher, [7, 1])
    await die(batcher, [7])
    for copy in copies:
        with pytest.raises(BatchFailedError, match="made engine workers fail"):
            await copy.answer.future
    assert batcher.queue.num_entries == 0


@in_loop
async def test_a_batch_that_waited_behind_the_fatal_one_is_not_blamed(batcher: Batcher) -> None:
    worker = ready(batcher, "cuda:0")
    batcher.submit(encodings(1, 2, 3, 4))
    batcher.submit(encodings(5, 6, 7, 8))
    await turn()
    assert worker.sizes == [4, 4]
    running, behind = worker.batches.values()
    batcher.worker_lost(worker)
    entries, _ = batcher.queue.next_batch(BatchLimits(100, 100), now=0.0)
    deaths = {int(entry.encoding.ids[0]): entry.deaths for entry in entries}
    assert {deaths[int(encoding.ids[0])] for encoding in running} == {1}
    assert {deaths[int(encoding.ids[0])] for encoding in behind} == {0}


@in_loop
async def test_a_worker_without_an_answer_is_killed(batcher: Batcher) -> None:
    batcher._pace.hang_timeout = 0.05
    worker = ready(batcher)
    request = batcher.submit(encodings(1))
    await asyncio.sleep(0.2)
    assert not batcher.workers
    assert worker.sizes == [1]
    successor = ready(batcher)
    await turn()
    successor.answer()
    assert len(await request.answer.future) == 1
    await asyncio.sleep(0.1)
    assert batcher.workers == [successor], "an answered batch is not watched any more"


@in_loop
async def test_a_batch_behind_another_is_measured_from_the_other_ones_answer(
    batcher: Batcher,
) -> None:
    worker = ready(batcher, "cuda:0")
    batcher.submit(encodings(*range(1, 9)))
    await turn()
    assert worker.sizes == [4, 4]
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        await asyncio.sleep(0.1)
        worker.answer()
        seconds.append(time.monotonic() - started)
    first, second = (20 / one for one in seconds)
    assert batcher._pace.rate(worker.kind) == pytest.approx(0.8 * first + 0.2 * second, rel=0.1)
    assert batcher._metrics.batch_seconds.sum == pytest.approx(sum(seconds), rel=0.1)


@in_loop
async def test_a_failed_batch_does_not_count_for_the_one_behind_it(batcher: Batcher) -> None:
    worker = ready(batcher, "cuda:0")
    requests = [batcher.submit(encodings(*range(start, start + 4))) for start in (1, 5)]
    await turn()
    await asyncio.sleep(0.2)
    earliest = time.monotonic()
    batcher.batch_failed(worker, next(iter(worker.batches)))
    latest = time.monotonic()
    for request in requests:  # they take turns, so that both were in it
        with pytest.raises(BatchFailedError):
            await request.answer.future
    worker.batches.pop(next(iter(worker.batches)))
    await asyncio.sleep(0.05)
    least = time.monotonic() - latest
    worker.answer()
    most = time.monotonic() - earliest
    rate = batcher._pace.rate(worker.kind)
    assert rate is not None
    assert 20 / most <= rate <= 20 / least


@in_loop
async def test_a_slow_worker_beside_a_fast_one_has_its_own_patience(batcher: Batcher) -> None:
    batcher._pace.hang_timeout = 0.05
    fast, slow = ready(batcher, "cuda:0"), ready(batcher, "cpu")
    batcher._pace.measure(fast.kind, 20, 0.001)
    batcher._pace.measure(slow.kind, 20, 0.5)
    request = batcher.submit(encodings(*range(1, 9)))
    await turn()
    assert (fast.sizes, slow.sizes) == ([4], [4])
    fast.answer()
    await asyncio.sleep(0.3)
    assert batcher.workers == [fast, slow], "nobody was killed"
    slow.answer()
    assert len(await request.answer.future) == 8


@in_loop
async def test_retry_times_add_up_the_ready_workers_rates(batcher: Batcher) -> None:
    assert batcher.seconds_of_work() == 1
    fast, slow = ready(batcher, "cuda:0"), ready(batcher, "cpu")
    batcher._pace.measure(fast.kind, 90, 1.0)
    batcher._pace.measure(slow.kind, 10, 1.0)
    batcher.submit(encodings(*range(1, 30)))
    await turn()
    assert batcher.seconds_of_work() == batcher.queue.num_tokens / 100
    batcher.worker_lost(fast)
    assert batcher.seconds_of_work() == batcher.queue.num_tokens / 10


@in_loop
async def test_a_workers_own_figure_bounds_the_first_batch(batcher: Batcher) -> None:
    batcher._pace.hang_timeout = 0.05
    worker = RecordingWorker(batcher, "cpu", BatchLimits(20, 4))
    worker.tokens_per_s = 100.0  # 5 tokens: ten times 0.05 s
    batcher.worker_ready(worker)
    batcher.submit(encodings(1))
    await asyncio.sleep(0.2)
    assert batcher.workers == [worker]
    await asyncio.sleep(0.6)
    assert not batcher.workers


@in_loop
async def test_a_batch_that_cannot_be_handed_over_leaves_nobody_waiting(batcher: Batcher) -> None:
    worker = ready(batcher)
    send, worker.send = worker.send, lambda batch_id, encodings: b"".join([None])
    requests = [batcher.submit(encodings(number)) for number in (1, 2)]
    await turn()
    for request in requests:
        with pytest.raises(InternalError):
            await request.answer.future
    assert not batcher.workers, "it was killed, for it may have half of the batch"
    worker.send = send
    batcher.worker_ready(worker)
    other = batcher.submit(encodings(3))
    await turn()
    worker.answer()
    assert len(await other.answer.future) == 1


class FailsAtTheSecond(VectorCache):
    puts = 0

    def put(self, key: bytes, row: np.ndarray) -> None:
        self.puts += 1
        if self.puts == 2:
            raise KeyError


@in_loop
async def test_rows_that_could_not_be_dealt_out_are_computed_again(batcher: Batcher) -> None:
    """A fault of ours in between costs the worker, and no request."""
    first = ready(batcher)
    requests = [batcher.submit(encodings(number)) for number in (1, 2, 3)]
    await turn()
    batcher.cache = FailsAtTheSecond(0)
    with pytest.raises(KeyError):
        first.answer()
    batcher.worker_lost(first)  # as the supervisor does then
    second = ready(batcher)
    await turn()
    assert second.sizes == [2], "the first one's row had arrived"
    second.answer()
    for number, request in zip((1, 2, 3), requests, strict=True):
        (row,) = await request.answer.future
        np.testing.assert_array_equal(row, vector_of(encoding(number).ids))


@pytest.mark.parametrize("faulty", ["_quarantine.blame", "queue.put_back"])
def test_a_lost_batch_that_cannot_be_put_back_leaves_nobody_waiting(faulty: str) -> None:
    """A fault of ours: its requests fail, and the next one is served."""

    @in_loop
    async def test(batcher: Batcher) -> None:
        owner, _, method = faulty.partition(".")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(getattr(batcher, owner), method, lambda *arguments: {}[0])
            first = ready(batcher, "cuda:0")
            requests = [batcher.submit(encodings(*numbers)) for numbers in ((1, 2), (3, 4, 5))]
            await turn()
            assert len(first.batches) == 1
            batcher.worker_lost(first)
        second = ready(batcher)
        await turn()
        for request in requests:
            with pytest.raises(InternalError):
                await request.answer.future
        other = batcher.submit(encodings(6))
        await turn()
        second.answer()
        assert len(await other.answer.future) == 1
        assert not batcher.queue.num_entries

    test()


@in_loop
async def test_a_worker_is_not_killed_because_this_process_was_held_up(batcher: Batcher) -> None:
    """Stopped with its container, or by a client: the answer may have come meanwhile."""
    batcher._pace.hang_timeout = 0.2
    worker = ready(batcher)
    batcher.submit(encodings(1))
    await turn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_out, "_LATE_S", 0.2)
        time.sleep(0.5)  # noqa: ASYNC251
        await asyncio.sleep(0.05)
    assert batcher.workers == [worker]
    await asyncio.sleep(0.3)
    assert not batcher.workers, "it had its time again, and no answer came"


@in_loop
async def test_a_lost_batch_whose_client_has_gone_is_not_repeated(batcher: Batcher) -> None:
    worker = ready(batcher)
    request = batcher.submit(encodings(1))
    await turn()
    batcher.drop(request)
    batcher.worker_lost(worker)
    assert batcher.queue.num_entries == 0


@in_loop
async def test_a_deadline_drops_what_waits(batcher: Batcher) -> None:
    request = batcher.submit(encodings(1), deadline=time.monotonic() - 1)
    worker = ready(batcher)
    await turn()
    assert not worker.batches
    with pytest.raises(DeadlineExceededError):
        await request.answer.future


@in_loop
async def test_a_deadline_does_not_touch_what_is_out(batcher: Batcher) -> None:
    worker = ready(batcher)
    request = batcher.submit(encodings(1))
    await turn()
    batcher.expire(request)
    worker.answer()
    assert len(await request.answer.future) == 1


@in_loop
async def test_fail_all_leaves_no_future_unresolved(batcher: Batcher) -> None:
    ready(batcher)
    out, waiting = batcher.submit(encodings(1, 2, 3, 4)), batcher.submit(encodings(5, 6))
    await turn()
    batcher.fail_all(UnavailableError("over"))
    for request in (out, waiting):
        with pytest.raises(UnavailableError, match="over"):
            await request.answer.future
    assert batcher.queue.num_entries == 0


# Equal inputs


@in_loop
async def test_equal_inputs_of_a_batch_are_computed_once(batcher: Batcher) -> None:
    worker = ready(batcher)
    requests = [batcher.submit(encodings(7, 8, 7)), batcher.submit(encodings(7))]
    await turn()
    assert worker.sizes == [2]
    worker.answer()
    rows = await requests[0].answer.future
    for number, row in zip((7, 8, 7), rows, strict=True):
        np.testing.assert_array_equal(row, vector_of(encoding(number).ids))
    np.testing.assert_array_equal((await requests[1].answer.future)[0], rows[0])
    assert batcher._metrics.shared_inputs.value == 2


@in_loop
async def test_an_input_joins_its_equal_at_work(batcher: Batcher) -> None:
    first, second = ready(batcher), ready(batcher)
    gone = batcher.submit(encodings(7))
    await turn()
    later = batcher.submit(encodings(7, 8))
    await turn()
    assert (first.sizes, second.sizes) == ([1], [1]), "only 8 went to the second worker"
    batcher.drop(gone)
    second.answer()
    first.answer()
    for number, row in zip((7, 8), await later.answer.future, strict=True):
        np.testing.assert_array_equal(row, vector_of(encoding(number).ids))
    again = batcher.submit(encodings(7))
    await turn()
    assert first.sizes == [1], "what was answered is at work no more"
    first.answer()
    await again.answer.future


@in_loop
async def test_what_joined_a_lost_batch_is_served_again(batcher: Batcher) -> None:
    first, second = ready(batcher), ready(batcher)
    requests = [batcher.submit(encodings(7))]
    await turn()
    requests.append(batcher.submit(encodings(7)))
    await turn()
    first.kill()
    await turn()
    assert second.sizes == [1]
    second.answer()
    for request in requests:
        np.testing.assert_array_equal((await request.answer.future)[0], vector_of(encoding(7).ids))


@in_loop
async def test_a_fault_is_told_to_each_by_its_own_index(batcher: Batcher) -> None:
    worker = ready(batcher)
    first, second = batcher.submit(encodings(7)), batcher.submit(encodings(8, 7))
    await turn()
    worker.answer({0: Fault.NOT_FINITE})
    with pytest.raises(NonFiniteVectorError, match=r"input\[0\]"):
        await first.answer.future
    with pytest.raises(NonFiniteVectorError, match=r"input\[1\]"):
        await second.answer.future


def test_the_cache_answers_what_was_computed() -> None:
    async def body() -> None:
        batcher = Batcher(metrics_of_one(), cache_bytes=10_000)
        worker = ready(batcher)
        first = batcher.submit(encodings(7))
        await turn()
        worker.answer()
        await first.answer.future
        known, mixed = batcher.submit(encodings(7, 7)), batcher.submit(encodings(8, 7))
        assert known.answer.done, "without a worker"
        await turn()
        assert worker.sizes == [1]
        worker.answer({0: Fault.NOT_FINITE})
        with pytest.raises(NonFiniteVectorError):
            await mixed.answer.future
        assert not batcher.submit(encodings(8)).answer.done, "a fault is not kept"
        hits, misses = batcher._metrics.cache_hits, batcher._metrics.cache_misses
        assert (hits.value, misses.value) == (3, 3)

    asyncio.run(body())


def test_vectors_are_shared_within_a_salt_alone() -> None:
    async def body() -> None:
        batcher = Batcher(metrics_of_one(), cache_bytes=10_000)
        worker = ready(batcher)
        salts = [b"a" * 16, b"b" * 16, b""]
        together = [batcher.submit(encodings(7), salt=salt) for salt in (*salts, salts[0])]
        await turn()
        assert worker.sizes == [3], "in flight: one of each"
        worker.answer()
        for request in together:
            np.testing.assert_array_equal(
                (await request.answer.future)[0], vector_of(encoding(7).ids)
            )
        assert all(batcher.submit(encodings(7), salt=salt).answer.done for salt in salts)
        assert not batcher.submit(encodings(7), salt=b"c" * 16).answer.done

    asyncio.run(body())
