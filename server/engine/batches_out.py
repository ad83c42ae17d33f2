"""The batches that workers have in hand: which, since when, and for how long they may have them.

Kills a worker that gives no answer for too long, and measures how fast the others are. Knows
neither the queue nor what becomes of an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from model.batch import num_tokens
from server.engine.metrics import Metrics
from server.engine.pace import Pace
from server.engine.pending_answer import PendingAnswer
from server.engine.request_queue import Entry
from server.engine.worker_link import Worker

logger = logging.getLogger("nv_embed.batcher")

_LATE_S = 1.0
"""A timer that is so late tells of this process, which was stopped or held up, not of a worker."""
_OVERDUE = 0.5
"""Of a batch's patience, after which its worker is no sign of readiness any more."""


@dataclass(slots=True)
class Batch:
    """What a worker has been given."""

    rows: dict[bytes, list[Entry[PendingAnswer]]]  # key -> the equal inputs that its row answers
    tokens: int
    handed_over: float
    patience: float  # seconds until its worker counts as hung
    watch: asyncio.TimerHandle | None = None  # kills the worker when no answer comes

    @property
    def entries(self) -> list[Entry[PendingAnswer]]:
        return [entry for equal in self.rows.values() for entry in equal]


class BatchesOut:
    """By worker, oldest first. Times are time.monotonic's."""

    def __init__(self, metrics: Metrics, pace: Pace) -> None:
        self._metrics, self._pace = metrics, pace
        self._of: dict[Worker, dict[int, Batch]] = {}
        self._ids = 0
        self._last_answer: dict[Worker, float] = {}
        self._at_work: dict[bytes, Batch] = {}

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batches in self._of.values() for batch in batches.values())

    @property
    def workers(self) -> list[Worker]:
        """The ready ones, in the order in which they became so."""
        return list(self._of)

    @property
    def keys(self) -> Collection[bytes]:
        """Of the inputs that are being computed."""
        return self._at_work.keys()

    def with_input(self, key: bytes) -> Batch | None:
        """The batch in which an equal input is being computed."""
        return self._at_work.get(key)

    def number(self, worker: Worker) -> int:
        """How many this worker has."""
        return len(self._of[worker])

    def is_stuck(self) -> bool:
        """Whether no worker has answered lately: each has a batch that is long overdue."""
        now = time.monotonic()
        for batches in self._of.values():
            for batch in batches.values():
                if now - batch.handed_over > _OVERDUE * batch.patience:
                    break
            else:
                return False
        return bool(self._of)

    def add_worker(self, worker: Worker) -> None:
        self._of[worker] = {}
        if worker.tokens_per_s > 0:
            self._pace.tell(worker.kind, worker.tokens_per_s)

    def remove_worker(self, worker: Worker) -> list[Batch]:
        """Returns what it had: no answer to these will come."""
        self._last_answer.pop(worker, None)
        batches = list(self._of.pop(worker).values())
        for batch in batches:
            self._end(batch)
        return batches

    def add(self, worker: Worker, rows: Mapping[bytes, list[Entry[PendingAnswer]]]) -> int:
        """A batch that is about to be handed over. -> its id."""
        self._ids = (self._ids + 1) % (1 << 32)
        tokens = num_tokens([equal[0].encoding for equal in rows.values()])
        in_hand = tokens + sum(batch.tokens for batch in self._of[worker].values())
        patience = self._pace.patience(worker.kind, in_hand)
        batch = Batch(dict(rows), tokens, time.monotonic(), patience)
        self._watch(worker, batch)
        self._of[worker][self._ids] = batch
        self._at_work.update(dict.fromkeys(rows, batch))
        return self._ids

    def get(self, worker: Worker, batch_id: int) -> Batch:
        return self._of[worker][batch_id]

    def take_back(self, worker: Worker, batch_id: int) -> Batch:
        """Its worker has answered."""
        batch = self._of[worker].pop(batch_id)
        self._last_answer[worker] = time.monotonic()
        self._end(batch)
        return batch

    def measure(self, worker: Worker, batch: Batch) -> None:
        """Its vectors have come: that tells how fast the worker is."""
        # It may have waited in the worker's hands for the one before it.
        begun = max(batch.handed_over, self._last_answer.get(worker, 0.0))
        seconds = time.monotonic() - begun
        self._metrics.batch_seconds.observe(seconds)
        tally = self._metrics.workers[worker.slot]
        tally.busy_seconds += seconds
        tally.batches += 1
        self._metrics.inputs.inc(len(batch.entries))
        self._metrics.tokens.inc(batch.tokens)
        self._pace.measure(worker.kind, batch.tokens, seconds)

    def _end(self, batch: Batch) -> None:
        """No answer to this batch is awaited any more."""
        if batch.watch is not None:
            batch.watch.cancel()
        for key in batch.rows:
            if self._at_work.get(key) is batch:
                del self._at_work[key]

    def _watch(self, worker: Worker, batch: Batch) -> None:
        due = time.monotonic() + batch.patience
        loop = asyncio.get_running_loop()
        batch.watch = loop.call_later(batch.patience, self._hung, worker, batch, due)

    def _hung(self, worker: Worker, batch: Batch, due: float) -> None:
        if time.monotonic() > due + _LATE_S:
            self._watch(worker, batch)  # its answer may lie in the socket, unread
            return
        logger.error("worker %d gave no answer for too long: killing it", worker.slot)
        worker.kill("hang")
