"""The life of an entry as a state machine: queued, in a batch, put back, answered, failed, expired
or cancelled, in any order that hypothesis can think of.

At every moment each entry of an unanswered request is in exactly one place, the queue counts what
waits in it, and no future changes once it is resolved; in the end every future is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.batch import BatchLimits, Encoding
from server.engine.batcher import Batcher
from server.engine.pending_answer import PendingAnswer
from server.engine.request_queue import QueuedRequest
from server.engine.wire import Fault
from server.errors import (
    BatchFailedError,
    DeadlineExceededError,
    DeviceMemoryError,
    NonFiniteVectorError,
    ServerError,
)
from tests.server.engine.test_batcher import RecordingWorker, metrics_of_one, turn
from tests.server.runners import vector_of

FAULTS = {Fault.NOT_FINITE: NonFiniteVectorError, Fault.NO_MEMORY: DeviceMemoryError}
pick = st.integers(0, 1000)
"""Chooses among what there is at the time."""


@dataclass(eq=False)
class Asked:
    encodings: list[Encoding]
    request: QueuedRequest[PendingAnswer]
    causes: set[type[ServerError]] = field(default_factory=set)  # for which it may fail
    cancelled: bool = False
    outcome: Any = None  # once resolved

    @property
    def future(self) -> asyncio.Future[list[np.ndarray]]:
        return self.request.answer.future


class Attentive(RecordingWorker):
    """Nothing may be handed over for a request that has its answer."""

    by_encoding: dict[int, Asked]

    def send(self, batch_id: int, encodings: Any) -> None:
        assert not any(self.by_encoding[id(e)].future.done() for e in encodings)
        super().send(batch_id, encodings)


class EntryLife(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.surprises: list[Any] = []
        self.runner.get_loop().set_exception_handler(lambda _, what: self.surprises.append(what))
        self.batcher = Batcher(metrics_of_one())
        self.workers: list[Attentive] = []
        self.asked: list[Asked] = []
        self.by_encoding: dict[int, Asked] = {}
        self.numbers = 0

    def run(self, act: Callable[[], object]) -> None:
        """On the loop, which turns afterwards."""

        async def body() -> None:
            act()
            await turn()

        self.runner.run(body())

    def of(self, encodings: list[Encoding]) -> list[Asked]:
        return [self.by_encoding[id(encoding)] for encoding in encodings]

    @property
    def busy(self) -> list[Attentive]:
        return [worker for worker in self.workers if worker.batches]

    @property
    def unanswered(self) -> list[Asked]:
        return [asked for asked in self.asked if not asked.future.done()]

    # What may happen

    @rule(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=8), late=st.booleans())
    def submit(self, lengths: list[int], late: bool) -> None:
        encodings = []
        for length in lengths:
            self.numbers += 1  # each of its own: a culprit's like would be refused
            encodings.append(Encoding(np.full(length, self.numbers, dtype=np.int32)))
        deadline = time.monotonic() - 1 if late else float("inf")
        causes: set[type[ServerError]] = {DeadlineExceededError} if late else set()

        def act() -> None:
            request = self.batcher.submit(encodings, deadline=deadline)
            asked = Asked(encodings, request, causes)
            self.asked.append(asked)
            self.by_encoding |= {id(encoding): asked for encoding in encodings}

        self.run(act)

    @precondition(lambda self: len(self.workers) < 3)
    @rule(cuda=st.booleans())
    def worker_comes(self, cuda: bool) -> None:
        device = "cuda:0" if cuda else "cpu"
        worker = Attentive(self.batcher, device, BatchLimits(20, 4))
        worker.by_encoding = self.by_encoding
        self.workers.append(worker)
        self.run(lambda: self.batcher.worker_ready(worker))

    @precondition(lambda self: self.busy)
    @rule(which=pick, faults=st.dictionaries(pick, st.sampled_from(Fault), max_size=2))
    def batch_is_done(self, which: int, faults: dict[int, Fault]) -> None:
        worker = self.busy[which % len(self.busy)]
        batch = next(iter(worker.batches.values()))
        faults = {row % len(batch): fault for row, fault in faults.items()}
        for row, fault in faults.items():
            self.of(batch)[row].causes.add(FAULTS[fault])
        self.run(lambda: worker.answer(faults))

    @precondition(lambda self: self.busy)
    @rule(which=pick)
    def batch_fails(self, which: int) -> None:
        worker = self.busy[which % len(self.busy)]
        batch_id = next(iter(worker.batches))
        for asked in self.of(worker.batches.pop(batch_id)):
            asked.causes.add(BatchFailedError)
        self.run(lambda: self.batcher.batch_failed(worker, batch_id))

    @precondition(lambda self: self.workers)
    @rule(which=pick)
    def worker_dies(self, which: int) -> None:
        worker = self.workers.pop(which % len(self.workers))
        oldest = next(iter(worker.batches.values()), [])
        if len(oldest) == 1:  # alone with it: it may be the culprit
            self.of(oldest)[0].causes.add(BatchFailedError)
        worker.batches.clear()
        self.run(worker.kill)

    @precondition(lambda self: self.unanswered)
    @rule(which=pick)
    def client_goes(self, which: int) -> None:
        asked = self.unanswered[which % len(self.unanswered)]
        asked.cancelled = True
        self.run(lambda: self.batcher.drop(asked.request))

    @precondition(lambda self: self.unanswered)
    @rule(which=pick)
    def deadline_passes(self, which: int) -> None:
        asked = self.unanswered[which % len(self.unanswered)]
        asked.causes |= {DeadlineExceededError} if asked.request.queued else set()
        self.run(lambda: self.batcher.expire(asked.request))

    # What must hold

    @invariant()
    def nothing_went_wrong_in_the_loop(self) -> None:
        assert not self.surprises

    @invariant()
    def every_entry_is_in_one_place(self) -> None:
        batches = [batch for worker in self.workers for batch in worker.batches.values()]
        out = [id(encoding) for batch in batches for encoding in batch]
        assert len(out) == len(set(out))
        tokens = entries = 0
        for asked in self.asked:
            waiting = {id(entry.encoding) for entry in asked.request.waiting}
            tokens += sum(len(entry) for entry in asked.request.waiting)
            entries += len(waiting)
            assert asked.request.queued == bool(waiting)
            if asked.future.done():
                assert not waiting
                continue
            for index, encoding in enumerate(asked.encodings):
                answered = asked.request.answer.rows[index] is not None
                assert (id(encoding) in waiting) + (id(encoding) in out) + answered == 1
        assert self.batcher.queue.num_tokens == tokens
        assert self.batcher.queue.num_entries == entries

    @invariant()
    def outcomes_are_right_and_final(self) -> None:
        for asked in self.asked:
            future = asked.future
            if not future.done():
                continue
            assert future.cancelled() == asked.cancelled
            if asked.cancelled:
                outcome: Any = "cancelled"
            elif (error := future.exception()) is not None:
                assert type(error) in asked.causes
                outcome = error
            else:
                outcome = future.result()
                for row, encoding in zip(outcome, asked.encodings, strict=True):
                    np.testing.assert_array_equal(row, vector_of(encoding.ids))
            assert asked.outcome is None or asked.outcome is outcome
            asked.outcome = outcome

    def teardown(self) -> None:
        """With a worker that answers, everything is resolved and nothing is left."""
        try:
            self.worker_comes(cuda=False) if len(self.workers) < 3 else None
            for _ in range(1000):
                if not self.busy:
                    break
                self.batch_is_done(0, {})
            self.outcomes_are_right_and_final()
            assert not self.unanswered
            assert (self.batcher.queue.num_tokens, self.batcher.queue.num_requests) == (0, 0)
            assert self.batcher.running_requests == 0
        finally:
            self.runner.close()


TestEntryLife = EntryLife.TestCase
TestEntryLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
