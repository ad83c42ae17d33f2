"""Moves batches from the queue to the workers and resolves the requests' futures.

The only one that resolves a future or puts an entry back. A batch is composed as late as possible:
when a worker is idle, or when a full one waits for a CUDA worker that has one batch in hand. No
sleeps, no polling. What workers have in hand is kept by `batches_out`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding
from server.engine.batches_out import Batch, BatchesOut
from server.engine.metrics import Death, Metrics
from server.engine.pace import Pace
from server.engine.pending_answer import PendingAnswer
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


class Batcher:
    """See the module. Implements `WorkerEvents`; every method runs on the event loop."""

    def __init__(
        self, metrics: Metrics, *, hang_timeout: float = 60.0, cache_bytes: int = 0
    ) -> None:
        """hang_timeout: seconds that an answer may take, at least, before its worker is killed.
        cache_bytes: how much is kept of what was computed."""
        self.queue: RequestQueue[PendingAnswer] = RequestQueue()
        self.cache = VectorCache(cache_bytes)
        self._metrics = metrics
        self._scheduled = False
        self._pace = Pace(hang_timeout)
        self._out = BatchesOut(metrics, self._pace)
        self._quarantine = Quarantine()

    # Requests

    def submit(
        self,
        encodings: Sequence[Encoding],
        *,
        deadline: float = float("inf"),
        priority: int = 0,
        salt: bytes = b"",
        key_name: str = "",
    ) -> QueuedRequest[PendingAnswer]:
        """Queue a request; `request.answer.future` gives its rows, one per encoding.

        priority: the lower the sooner. salt: vectors are shared with those of the same one alone.
        Raises BatchFailedError for an input that is known to kill workers.
        """
        now = time.monotonic()
        culprit = self._quarantine.first_culprit(encodings, now)
        if culprit is not None:
            raise _deadly(encodings[culprit].input(culprit))
        known = self._cached(encodings, salt) if self.cache.limit else {}
        request = QueuedRequest.of(
            encodings,
            PendingAnswer(len(encodings)),
            deadline=deadline,
            arrived=now,
            known=known,
            priority=priority,
            salt=salt,
            key_name=key_name,
        )
        for index, row in known.items():
            request.answer.set_row(index, row)
        if request.waiting:
            self.queue.append(request)
            self._schedule()
        return request

    def _cached(self, encodings: Sequence[Encoding], salt: bytes) -> dict[int, NDArray[np.float32]]:
        rows = {i: self.cache.get(salt + encoding.key) for i, encoding in enumerate(encodings)}
        known = {index: row for index, row in rows.items() if row is not None}
        self._metrics.cache_hits.inc(len(known))
        self._metrics.cache_misses.inc(len(rows) - len(known))
        return known

    def drop(self, request: QueuedRequest[PendingAnswer]) -> None:
        """Nobody wants the answer any more: free what waits; rows already out are ignored."""
        self.queue.discard(request)
        request.answer.future.cancel()

    def expire(self, request: QueuedRequest[PendingAnswer]) -> None:
        """The deadline has passed: a request with inputs that still wait fails."""
        if request.queued:
            self._metrics.expired.inc()
            self._fail(request, DeadlineExceededError("the deadline passed while inputs waited"))

    def fail_all(self, error: ServerError) -> None:
        """Fail everything that is queued or out."""
        for batch in self._out:
            for entry in batch.entries:
                self._fail(entry.request, error)
        for request in self.queue.clear():
            self._fail(request, error)

    @property
    def running_requests(self) -> int:
        """Requests with an input in a worker's hands."""
        return len({id(entry.request) for batch in self._out for entry in batch.entries})

    @property
    def workers(self) -> list[Worker]:
        """The ready ones."""
        return self._out.workers

    def is_stuck(self) -> bool:
        """Whether no worker has answered lately."""
        return self._out.is_stuck()

    def seconds_of_work(self) -> float:
        """How long the queue will take at the rate of the ready workers; 1 before it is known."""
        rate = sum(self._pace.rate(worker.kind) or 0.0 for worker in self.workers)
        return self.queue.num_tokens / rate if rate else 1.0

    # Workers

    def worker_ready(self, worker: Worker) -> None:
        self._out.add_worker(worker)
        tally = self._metrics.workers[worker.slot]
        tally.pid, tally.start_seconds = worker.pid, worker.start_seconds
        self._schedule()

    def worker_lost(self, worker: Worker) -> None:
        batches = self._out.remove_worker(worker)
        tally = self._metrics.workers[worker.slot]
        tally.pid, tally.device_bytes = None, 0
        try:
            if batches:
                self._blame(batches[0])  # the others waited behind it
            # The oldest batch goes back last, so that it comes first.
            for batch in reversed(batches):
                self.queue.put_back(e for e in batch.entries if e.request.answer.lacks(e.index))
        except Exception:  # a fault of ours: nobody must wait for what will never come
            logger.exception("the batches of a lost worker could not be put back")
            for batch in batches:
                for entry in batch.entries:
                    self._fail(entry.request, InternalError("the server failed on this request"))
        self._schedule()

    def worker_ended(self, cause: Death | None) -> None:
        if cause is None:
            self._metrics.failed_starts.inc()
        else:
            self._metrics.count_death(cause)

    def memory_told(self, worker: Worker, splits: int, device_bytes: int) -> None:
        self._metrics.memory_splits.inc(splits)
        self._metrics.workers[worker.slot].device_bytes = device_bytes

    def batch_done(
        self,
        worker: Worker,
        batch_id: int,
        rows: NDArray[np.float32],
        faults: Mapping[int, Fault],
    ) -> None:
        batch = self._out.get(worker, batch_id)
        self._out.measure(worker, batch)
        for index, (row, (key, equal)) in enumerate(zip(rows, batch.rows.items(), strict=True)):
            fault = faults.get(index)
            if fault is None:
                self.cache.put(key, row)
            elif fault is Fault.NOT_FINITE:
                self._metrics.non_finite.inc(len(equal))
            for entry in equal:
                if fault is not None:
                    self._fail(entry.request, _fault_error(fault, entry))
                elif not entry.request.answer.done:
                    entry.request.answer.set_row(entry.index, row)
        # Last, so that a batch whose rows could not be dealt out is still known to be out.
        self._out.take_back(worker, batch_id)
        self._compose()  # at once: the answers are written while the worker is at work again

    def batch_failed(self, worker: Worker, batch_id: int) -> None:
        batch = self._out.take_back(worker, batch_id)
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
                if self._out.number(worker) == depth and self._may_take(worker, depth):
                    self._hand_over(worker)

    def _may_take(self, worker: Worker, depth: int) -> bool:
        if depth == 0:
            return True
        return worker.is_cuda and self.queue.is_full(worker.limits)

    def _hand_over(self, worker: Worker) -> None:
        now = time.monotonic()
        taken, expired = self.queue.next_batch(worker.limits, now, self._out.keys)
        for request in expired:
            self._metrics.expired.inc()
            self._fail(request, DeadlineExceededError("the deadline passed while inputs waited"))
        try:
            self._send(worker, taken, now)
        except Exception:  # a fault of ours: nobody must wait for what will never come
            logger.exception("a batch could not be handed over")
            for entry in taken:
                self._fail(entry.request, InternalError("the server failed on this request"))
            if self._out.number(worker):  # it may be among them, and will not be answered
                worker.kill()

    def _send(self, worker: Worker, taken: Sequence[Entry[PendingAnswer]], now: float) -> None:
        for entry in taken:
            request = entry.request
            self._metrics.queue_seconds.observe(now - request.arrived)
            if not request.begun:
                request.begun = now
        rows: dict[bytes, list[Entry[PendingAnswer]]] = {}
        for entry in taken:
            key = entry.key
            running = None if entry.alone else self._out.with_input(key)
            (rows if running is None else running.rows).setdefault(key, []).append(entry)
        self._metrics.shared_inputs.inc(len(taken) - len(rows))
        if not rows:
            return
        encodings = [equal[0].encoding for equal in rows.values()]
        batch_id = self._out.add(worker, rows)
        tokens = self._out.get(worker, batch_id).tokens
        worker.send(batch_id, encodings)
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.batch_inputs.observe(len(encodings))

    def _blame(self, batch: Batch) -> None:
        """Its worker died while it ran this batch."""
        culprit = self._quarantine.blame(batch.entries, time.monotonic())
        if culprit is not None:
            self._metrics.quarantined.inc()
            logger.error(
                "an input of %d tokens killed %d workers in a row, alone: requests with it fail",
                len(culprit.encoding),
                culprit.deaths_alone,
            )
            key = culprit.key
            computed = (batch, *self._out)
            equal = [entry for one in computed for entry in one.rows.get(key, ())]
            for entry in equal + self.queue.equal_to(key):
                self._fail(entry.request, _deadly(entry.input))

    def _fail(self, request: QueuedRequest[PendingAnswer], error: ServerError) -> None:
        self.queue.discard(request)
        request.answer.fail(error)


def _fault_error(fault: Fault, entry: Entry[PendingAnswer]) -> ServerError:
    if fault is Fault.NOT_FINITE:
        return NonFiniteVectorError.of(entry.input)
    return DeviceMemoryError.of(entry.input, len(entry.encoding))


def _deadly(index: int) -> BatchFailedError:
    return BatchFailedError(
        f"input[{index}] made engine workers fail, again and again; it is refused for a while",
        param=f"input[{index}]",
    )
