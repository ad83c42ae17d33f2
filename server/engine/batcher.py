"""Moves batches from the queue to the workers and resolves the requests' futures.

The only one that resolves a future or puts an entry back. A batch is
composed as late as possible: when a worker is idle, or when a full one waits for a CUDA worker
that has one batch in hand. No sleeps, no polling.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding
from server.engine.metrics import Metrics
from server.engine.pace import Pace
from server.engine.quarantine import Quarantine
from server.engine.request_queue import Entry, QueuedRequest, RequestQueue
from server.engine.vector_cache import VectorCache
from server.engine.wire import Fault
from server.engine.worker_link import Worker
from server.errors import (
    BatchFailedError,
    DeadlineExceededError,
    DeviceMemoryError,
    InternalError,
    NonFiniteVectorError,
    ServerError,
)

logger = logging.getLogger("nv_embed.batcher")

_CUDA_DEPTH = 2
"""Batches out at once per CUDA worker, so that it need not wait for the next; CPU workers: 1."""
_LATE_S = 1.0
"""A timer that is so late tells of this process, which was stopped or held up, not of a worker."""
_OVERDUE = 0.5
"""Of a batch's patience, after which its worker is no sign of readiness any more."""


class Answer:
    """The waiter of a request: gathers its rows, then wakes who awaits `future`."""

    __slots__ = ("future", "missing", "rows")

    def __init__(self, num_inputs: int) -> None:
        self.future: asyncio.Future[list[NDArray[np.float32]]] = (
            asyncio.get_running_loop().create_future()
        )
        self.rows: list[NDArray[np.float32] | None] = [None] * num_inputs
        self.missing = num_inputs

    @property
    def done(self) -> bool:
        return self.future.done()

    def lacks(self, index: int) -> bool:
        """Whether this row is still awaited."""
        return not self.done and self.rows[index] is None

    def set_row(self, index: int, row: NDArray[np.float32]) -> None:
        assert self.rows[index] is None, index
        self.rows[index] = row
        self.missing -= 1
        if not self.missing and not self.done:
            self.future.set_result([row for row in self.rows if row is not None])

    def fail(self, error: ServerError) -> None:
        if not self.done:
            self.future.set_exception(error)


@dataclass(slots=True)
class _Batch:
    rows: dict[bytes, list[Entry[Answer]]]  # key -> the equal inputs that its row answers
    tokens: int
    handed_over: float
    patience: float  # seconds until its worker counts as hung
    watch: asyncio.TimerHandle | None = None  # kills the worker when no answer comes

    @property
    def entries(self) -> list[Entry[Answer]]:
        return [entry for equal in self.rows.values() for entry in equal]


class Batcher:
    """See the module. Implements `WorkerEvents`; every method runs on the event loop."""

    def __init__(
        self, metrics: Metrics, *, hang_timeout: float = 60.0, cache_bytes: int = 0
    ) -> None:
        """hang_timeout: seconds that an answer may take, at least, before its worker is killed.
        cache_bytes: how much is kept of what was computed."""
        self.queue: RequestQueue[Answer] = RequestQueue()
        self.workers: list[Worker] = []
        self.cache = VectorCache(cache_bytes)
        self._metrics = metrics
        self._out: dict[Worker, dict[int, _Batch]] = {}
        self._batch_ids = 0
        self._scheduled = False
        self._pace = Pace(hang_timeout)
        self._last_answer: dict[Worker, float] = {}
        self._quarantine = Quarantine()
        self._at_work: dict[bytes, _Batch] = {}

    # Requests

    def submit(
        self, encodings: Sequence[Encoding], *, deadline: float = float("inf")
    ) -> QueuedRequest[Answer]:
        """Queue a request; `request.waiter.future` gives its rows, one per encoding.

        Raises BatchFailedError for an input that is known to kill workers.
        """
        now = time.monotonic()
        culprit = self._quarantine.first_culprit(encodings, now)
        if culprit is not None:
            raise _deadly(culprit)
        known = self._cached(encodings) if self.cache.limit else {}
        request = QueuedRequest.of(
            encodings, Answer(len(encodings)), deadline=deadline, arrived=now, but=known
        )
        for index, row in known.items():
            request.waiter.set_row(index, row)
        if request.waiting:
            self.queue.append(request)
            self._schedule()
        return request

    def _cached(self, encodings: Sequence[Encoding]) -> dict[int, NDArray[np.float32]]:
        rows = {i: self.cache.get(encoding.key) for i, encoding in enumerate(encodings)}
        known = {index: row for index, row in rows.items() if row is not None}
        self._metrics.cache_hits.inc(len(known))
        self._metrics.cache_misses.inc(len(rows) - len(known))
        return known

    def drop(self, request: QueuedRequest[Answer]) -> None:
        """Nobody wants the answer any more: free what waits; rows already out are ignored."""
        self.queue.discard(request)
        request.waiter.future.cancel()

    def expire(self, request: QueuedRequest[Answer]) -> None:
        """The deadline has passed: a request with inputs that still wait fails."""
        if request.queued:
            self._metrics.expired.inc()
            self._fail(request, DeadlineExceededError("the deadline passed while inputs waited"))

    def fail_all(self, error: ServerError) -> None:
        """Fail everything that is queued or out."""
        for batches in self._out.values():
            for batch in batches.values():
                for entry in batch.entries:
                    self._fail(entry.request, error)
        for request in self.queue.clear():
            self._fail(request, error)

    @property
    def running_requests(self) -> int:
        """Requests with an input in a worker's hands."""
        out = (batch for batches in self._out.values() for batch in batches.values())
        return len({id(entry.request) for batch in out for entry in batch.entries})

    def is_stuck(self) -> bool:
        """Whether no worker has answered lately: each has a batch that is long overdue."""
        now = time.monotonic()
        return bool(self._out) and all(
            any(now - b.handed_over > _OVERDUE * b.patience for b in batches.values())
            for batches in self._out.values()
        )

    def seconds_of_work(self) -> float:
        """How long the queue will take at the rate of the ready workers; 1 before it is known."""
        rate = sum(self._pace.rate(worker.kind) or 0.0 for worker in self.workers)
        return self.queue.num_tokens / rate if rate else 1.0

    # Workers

    def worker_ready(self, worker: Worker) -> None:
        self.workers.append(worker)
        self._out[worker] = {}
        if worker.tokens_per_s > 0:
            self._pace.tell(worker.kind, worker.tokens_per_s)
        self._schedule()

    def worker_lost(self, worker: Worker) -> None:
        self.workers.remove(worker)
        self._metrics.worker_deaths.inc()
        self._last_answer.pop(worker, None)
        batches = list(self._out.pop(worker).values())
        for batch in batches:
            self._end(batch)
        try:
            if batches:
                self._blame(batches[0])  # the others waited behind it
            # The oldest batch goes back last, so that it comes first.
            for batch in reversed(batches):
                self.queue.put_back(e for e in batch.entries if e.request.waiter.lacks(e.index))
        except Exception:  # a fault of ours: nobody must wait for what will never come
            logger.exception("the batches of a lost worker could not be put back")
            for batch in batches:
                for entry in batch.entries:
                    self._fail(entry.request, InternalError("the server failed on this request"))
        self._schedule()

    def batch_done(
        self,
        worker: Worker,
        batch_id: int,
        rows: NDArray[np.float32],
        faults: Mapping[int, Fault],
    ) -> None:
        batch = self._out[worker][batch_id]
        self._measure(worker, batch)
        for index, (row, (key, equal)) in enumerate(zip(rows, batch.rows.items(), strict=True)):
            fault = faults.get(index)
            if fault is None:
                self.cache.put(key, row)
            for entry in equal:
                if fault is not None:
                    self._fail(entry.request, _fault_error(fault, entry))
                elif not entry.request.waiter.done:
                    entry.request.waiter.set_row(entry.index, row)
        # Last, so that a batch whose rows could not be dealt out is still known to be out.
        self._take_back(worker, batch_id)
        self._schedule()

    def batch_failed(self, worker: Worker, batch_id: int) -> None:
        batch = self._take_back(worker, batch_id)
        for entry in batch.entries:
            self._fail(
                entry.request,
                BatchFailedError("the model failed on the batch that held this request"),
            )
        self._schedule()

    # Composition

    def _schedule(self) -> None:
        """Compose once per turn of the loop: what is parsed in one turn goes together."""
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._compose)

    def _compose(self) -> None:
        self._scheduled = False
        # Idle workers first, so that a second batch never goes out while another has none.
        for depth in range(_CUDA_DEPTH):
            for worker in self.workers:
                if len(self._out[worker]) == depth and self._may_take(worker, depth):
                    self._hand_over(worker)

    def _may_take(self, worker: Worker, depth: int) -> bool:
        if depth == 0:
            return True
        return worker.is_cuda and self.queue.is_full(worker.limits)

    def _hand_over(self, worker: Worker) -> None:
        now = time.monotonic()
        taken, expired = self.queue.next_batch(worker.limits, now, self._at_work.keys())
        for request in expired:
            self._metrics.expired.inc()
            self._fail(request, DeadlineExceededError("the deadline passed while inputs waited"))
        try:
            self._send(worker, taken, now)
        except Exception:  # a fault of ours: nobody must wait for what will never come
            logger.exception("a batch could not be handed over")
            for entry in taken:
                self._fail(entry.request, InternalError("the server failed on this request"))
            if self._out[worker]:  # it may be among them, and will not be answered
                worker.kill()

    def _send(self, worker: Worker, taken: Sequence[Entry[Answer]], now: float) -> None:
        for entry in taken:
            self._metrics.queue_seconds.observe(now - entry.request.arrived)
        rows: dict[bytes, list[Entry[Answer]]] = {}
        for entry in taken:
            key = entry.key
            running = None if entry.alone else self._at_work.get(key)
            (rows if running is None else running.rows).setdefault(key, []).append(entry)
        self._metrics.shared_inputs.inc(len(taken) - len(rows))
        if not rows:
            return
        self._batch_ids = (self._batch_ids + 1) % (1 << 32)
        encodings = [equal[0].encoding for equal in rows.values()]
        tokens = sum(map(len, encodings))
        in_hand = tokens + sum(batch.tokens for batch in self._out[worker].values())
        batch = _Batch(rows, tokens, now, self._pace.patience(worker.kind, in_hand))
        self._watch(worker, batch)
        self._out[worker][self._batch_ids] = batch
        self._at_work.update(dict.fromkeys(rows, batch))
        worker.send(self._batch_ids, encodings)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_inputs.observe(len(encodings))

    def _take_back(self, worker: Worker, batch_id: int) -> _Batch:
        batch = self._out[worker].pop(batch_id)
        self._last_answer[worker] = time.monotonic()
        self._end(batch)
        return batch

    def _end(self, batch: _Batch) -> None:
        """No answer to this batch is awaited any more."""
        if batch.watch is not None:
            batch.watch.cancel()
        for key in batch.rows:
            if self._at_work.get(key) is batch:
                del self._at_work[key]

    def _watch(self, worker: Worker, batch: _Batch) -> None:
        due = time.monotonic() + batch.patience
        loop = asyncio.get_running_loop()
        batch.watch = loop.call_later(batch.patience, self._hung, worker, batch, due)

    def _hung(self, worker: Worker, batch: _Batch, due: float) -> None:
        if time.monotonic() > due + _LATE_S:
            self._watch(worker, batch)  # its answer may lie in the socket, unread
            return
        logger.error("worker %d gave no answer for too long: killing it", worker.slot)
        worker.kill()

    def _measure(self, worker: Worker, batch: _Batch) -> None:
        # It may have waited in the worker's hands for the one before it.
        begun = max(batch.handed_over, self._last_answer.get(worker, 0.0))
        seconds = time.monotonic() - begun
        self._metrics.batch_seconds.observe(seconds)
        self._metrics.inputs.inc(len(batch.entries))
        self._metrics.tokens.inc(batch.tokens)
        self._pace.measure(worker.kind, batch.tokens, seconds)

    def _blame(self, batch: _Batch) -> None:
        """Its worker died while it ran this batch."""
        culprit = self._quarantine.blame(batch.entries, time.monotonic())
        if culprit is not None:
            logger.error(
                "an input of %d tokens killed %d workers in a row, alone: requests with it fail",
                len(culprit),
                culprit.deaths_alone,
            )
            key = culprit.key
            out = [b for batches in self._out.values() for b in batches.values()]
            equal = [entry for b in (batch, *out) for entry in b.rows.get(key, ())]
            for entry in equal + self.queue.equal_to(key):
                self._fail(entry.request, _deadly(entry.index))

    def _fail(self, request: QueuedRequest[Answer], error: ServerError) -> None:
        self.queue.discard(request)
        request.waiter.fail(error)


def _fault_error(fault: Fault, entry: Entry[Answer]) -> ServerError:
    param = f"input[{entry.index}]"
    if fault is Fault.NOT_FINITE:
        return NonFiniteVectorError(f"the model's vector for {param} is not finite", param=param)
    return DeviceMemoryError(
        f"{param} has {len(entry)} tokens, which do not fit into the device's memory: shorten it",
        param=param,
    )


def _deadly(index: int) -> BatchFailedError:
    return BatchFailedError(
        f"input[{index}] made engine workers fail, again and again; it is refused for a while",
        param=f"input[{index}]",
    )
