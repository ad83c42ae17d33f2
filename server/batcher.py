"""Moves batches from the queue to the workers and resolves the requests' futures.

The only one that resolves a future, counts an entry's attempts, or puts an entry back. A batch is
composed as late as possible: when a worker is idle, or when a full one waits for a CUDA worker
that has one batch in hand. No sleeps, no polling.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.batch import BatchLimits, Encoding
from server.errors import (
    BatchFailedError,
    DeadlineExceededError,
    NonFiniteVectorError,
    ServerError,
)
from server.metrics import Metrics
from server.request_queue import Entry, QueuedRequest, RequestQueue
from server.supervisor import Worker

logger = logging.getLogger("nv_embed.batcher")

_MAX_ATTEMPTS = 3
"""Workers that may die over an entry before its request is given up."""
_CUDA_DEPTH = 2
"""Batches out at once per CUDA worker, so that it need not wait for the next; CPU workers: 1."""
_RATE_SMOOTHING = 0.2


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
    entries: list[Entry[Answer]]
    handed_over: float
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = sum(len(entry) for entry in self.entries)


class Batcher:
    """See the module. Implements `WorkerEvents`; every method runs on the event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self.queue: RequestQueue[Answer] = RequestQueue()
        self.workers: list[Worker] = []
        self._metrics = metrics
        self._out: dict[Worker, dict[int, _Batch]] = {}
        self._batch_ids = 0
        self._scheduled = False
        self._tokens_per_s = 0.0

    # Requests

    def submit(
        self, encodings: Sequence[Encoding], *, deadline: float = float("inf")
    ) -> QueuedRequest[Answer]:
        """Queue a request; `request.waiter.future` gives its rows, one per encoding."""
        now = time.monotonic()
        request = QueuedRequest.of(
            encodings, Answer(len(encodings)), deadline=deadline, arrived=now
        )
        self.queue.append(request)
        self._schedule()
        return request

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
        everything = BatchLimits(max_tokens=1 << 62, max_seqs=1 << 62)
        waiting, expired = self.queue.next_batch(everything, now=-1.0)
        for request in [entry.request for entry in waiting] + expired:
            self._fail(request, error)

    @property
    def running_requests(self) -> int:
        """Requests with an input in a worker's hands."""
        out = (batch for batches in self._out.values() for batch in batches.values())
        return len({id(entry.request) for batch in out for entry in batch.entries})

    def seconds_of_work(self) -> float:
        """How long the queue will take at the measured rate; 1 before there is one."""
        rate = self._tokens_per_s * max(1, len(self.workers))
        return self.queue.num_tokens / rate if rate else 1.0

    # Workers

    def worker_ready(self, worker: Worker) -> None:
        self.workers.append(worker)
        self._out[worker] = {}
        self._schedule()

    def worker_lost(self, worker: Worker) -> None:
        self.workers.remove(worker)
        self._metrics.worker_deaths.inc()
        # The oldest batch goes back last, so that it comes first.
        for batch in reversed(self._out.pop(worker).values()):
            self._retry(batch.entries)
        self._schedule()

    def batch_done(
        self, worker: Worker, batch_id: int, rows: NDArray[np.float32], bad: Sequence[int]
    ) -> None:
        batch = self._out[worker].pop(batch_id)
        self._measure(batch)
        for index in bad:
            entry = batch.entries[index]
            error = NonFiniteVectorError(
                f"the model returned a vector that is not finite for input[{entry.index}]",
                param=f"input[{entry.index}]",
            )
            self._fail(entry.request, error)
        for entry, row in zip(batch.entries, rows, strict=True):
            if not entry.request.waiter.done:
                entry.request.waiter.set_row(entry.index, row)
        self._schedule()

    def batch_failed(self, worker: Worker, batch_id: int) -> None:
        batch = self._out[worker].pop(batch_id)
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
        entries, expired = self.queue.next_batch(worker.limits, now)
        for request in expired:
            self._metrics.expired.inc()
            self._fail(request, DeadlineExceededError("the deadline passed while inputs waited"))
        if not entries:
            return
        self._batch_ids = (self._batch_ids + 1) % (1 << 32)
        batch = _Batch(entries, now)
        self._out[worker][self._batch_ids] = batch
        worker.send(self._batch_ids, [entry.encoding for entry in entries])
        for entry in entries:
            self._metrics.queue_seconds.observe(now - entry.request.arrived)
        self._metrics.batch_tokens.observe(batch.tokens)
        self._metrics.batch_inputs.observe(len(entries))

    def _measure(self, batch: _Batch) -> None:
        seconds = time.monotonic() - batch.handed_over
        self._metrics.batch_seconds.observe(seconds)
        self._metrics.inputs.inc(len(batch.entries))
        self._metrics.tokens.inc(batch.tokens)
        rate = batch.tokens / max(seconds, 1e-6)
        weight = _RATE_SMOOTHING if self._tokens_per_s else 1.0
        self._tokens_per_s += weight * (rate - self._tokens_per_s)

    def _retry(self, entries: Sequence[Entry[Answer]]) -> None:
        """Put the entries of a lost batch back, but for those that nobody awaits."""
        wanted = []
        for entry in entries:
            entry.attempts += 1
            if entry.attempts >= _MAX_ATTEMPTS:
                self._fail(
                    entry.request,
                    BatchFailedError(
                        f"{entry.attempts} workers died over a batch with input[{entry.index}]"
                    ),
                )
            elif not entry.request.waiter.done:
                wanted.append(entry)
        # Only now: an entry that failed takes the others of its request with it.
        self.queue.put_back(entry for entry in wanted if not entry.request.waiter.done)

    def _fail(self, request: QueuedRequest[Answer], error: ServerError) -> None:
        self.queue.discard(request)
        request.waiter.fail(error)
