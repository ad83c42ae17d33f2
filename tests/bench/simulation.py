"""Servers under a virtual clock: who waits, who is refused, when each answer comes.

Pure: no time passes and nothing starts; equal arguments give equal outcomes. What decides is the
server's own: `RequestQueue.next_batch`, `BatchLimits`, how many batches a CUDA worker has, the
margin of the estimate that admission goes by. Modelled are the front's event loop, where one thing
is done after the other in the order in which asyncio does it, its threads for long texts, and
workers, whose batches take what `Cost` says. Left out: workers that die, clients that go, named
keys, priorities, the cache, the network.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np

from model.batch import BATCH_SEQS, BatchLimits, Encoding
from server.engine.batcher import _CUDA_DEPTH
from server.engine.request_queue import Entry, QueuedRequest, RequestQueue
from server.engine.tokenizing import _INLINE_CHARS, _MARGIN
from server.settings import MAX_REQUEST_TOKENS
from tests.bench.batch_cost import Cost

BALANCERS = ("least-connections", "round-robin")
_THREADS = 2
"""That tokenize, as the server's Tokenizing has."""
_CHARS_PER_TOKEN = 4.0
Action = Callable[[], None]


class Arrival(NamedTuple):
    """A request: when it is sent, in seconds, and the tokens of each of its inputs."""

    at: float
    tokens: tuple[int, ...]


class Front(NamedTuple):
    """Seconds of the front process for a request. `wire` passes, and takes nothing of the loop."""

    read: float = 0.0  # until its tokens are sought; a refusal costs as much
    token: float = 0.0  # of each, to find it
    write: float = 0.0  # of its answer
    row: float = 0.0  # of each vector in that
    wire: float = 0.0  # between client and front, in all


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. deadline: seconds that a request may wait. ids: what is sent is token ids,
    whose number is known at admission."""

    cost: Cost
    limits: BatchLimits = field(default_factory=lambda: BatchLimits(1024, BATCH_SEQS))
    front: Front = field(default_factory=Front)
    replicas: int = 1
    workers: int = 1
    cuda: bool = False
    max_queued_tokens: int = 1_000_000
    deadline: float = math.inf
    balancer: str = BALANCERS[0]
    ids: bool = False

    def expected(self, tokens: int) -> int:
        """What admission takes a request for."""
        return tokens if self.ids else min(math.ceil(_MARGIN * tokens), MAX_REQUEST_TOKENS)

    def is_short(self, tokens: int) -> bool:
        """Whether it is tokenized on the event loop."""
        return tokens * (1.0 if self.ids else _CHARS_PER_TOKEN) <= _INLINE_CHARS

    def tokens_per_s(self, mean_tokens: float) -> float:
        """Of full batches of inputs of this mean length, on all workers."""
        limits = self.limits
        inputs = max(1.0, min(limits.max_seqs, limits.max_tokens / mean_tokens))
        tokens = inputs * mean_tokens
        seconds = self.cost.batch + self.cost.token * tokens + self.cost.input * inputs
        return self.replicas * self.workers * tokens / seconds


@dataclass(slots=True)
class Outcome:
    """What became of each arrival, in their order, and how busy the parts were."""

    statuses: list[int]  # 200, 429, 504
    seconds: list[float]  # from when it was sent to its answer
    done: list[float]  # when that came
    lasted: float  # until the last arrival
    worker_busy: float = 0.0  # share of the workers' time while requests arrived
    front_busy: float = 0.0
    batches: int = 0
    batch_tokens: int = 0

    def __len__(self) -> int:
        return len(self.statuses)

    def count(self, status: int) -> int:
        return self.statuses.count(status)

    def latency(self, share: float) -> float:
        """The seconds in which this share of the answers came."""
        answered = [
            s for s, status in zip(self.seconds, self.statuses, strict=True) if status == 200
        ]
        return float(np.quantile(answered, share)) if answered else math.nan

    @property
    def answers_per_s(self) -> float:
        """While requests arrived."""
        pairs = zip(self.done, self.statuses, strict=True)
        return sum(status == 200 and at <= self.lasted for at, status in pairs) / self.lasted


def poisson(
    rate: float, seconds: float, requests: Sequence[tuple[int, ...]], seed: int
) -> list[Arrival]:
    """Requests at random moments, so many a second, each one of `requests`, drawn."""
    generator = np.random.default_rng(seed)
    count = generator.poisson(rate * seconds)
    times = np.sort(generator.uniform(0.0, seconds, count))
    drawn = generator.integers(len(requests), size=count)
    return [Arrival(float(at), requests[i]) for at, i in zip(times, drawn, strict=True)]


def simulate(setup: Setup, arrivals: Sequence[Arrival]) -> Outcome:
    """What these servers do with these requests, sent whatever becomes of earlier ones."""
    assert setup.balancer in BALANCERS, setup.balancer
    lasted = max((arrival.at for arrival in arrivals), default=0.0)
    count = len(arrivals)
    outcome = Outcome([0] * count, [math.nan] * count, [math.nan] * count, lasted)
    clock = _Clock()
    replicas = [_Replica(setup, clock, outcome) for _ in range(setup.replicas)]
    least = setup.balancer == "least-connections"
    turn = 0

    def arrive(index: int) -> None:
        nonlocal turn
        # The first of the least, from the one whose turn it is on.
        order = [replicas[(turn + step) % len(replicas)] for step in range(len(replicas))]
        chosen = min(order, key=lambda replica: replica.open) if least else order[0]
        turn = (turn + 1) % len(replicas)
        chosen.receive(index, arrivals[index])

    for index, arrival in enumerate(arrivals):
        clock.at(arrival.at, partial(arrive, index))
    clock.run()
    whole = max(lasted, 1e-9) * setup.replicas
    outcome.worker_busy = sum(r.worker_seconds for r in replicas) / (whole * setup.workers)
    outcome.front_busy = sum(r.loop.seconds for r in replicas) / whole
    return outcome


class _Clock:
    """Actions in the order of their times; of equal ones, in the order in which they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        self._set = 0
        self._due: list[tuple[float, int, Action]] = []

    def at(self, time: float, action: Action) -> None:
        self._set += 1
        heapq.heappush(self._due, (time, self._set, action))

    def run(self) -> None:
        while self._due:
            self.now, _, action = heapq.heappop(self._due)
            action()


class _Turns:
    """One after the other, in the order in which they come: an event loop, or threads of a pool."""

    def __init__(self, clock: _Clock, lasts: float, width: int = 1) -> None:
        """lasts: until when its work is counted."""
        self._clock, self._lasts, self._free = clock, lasts, width
        self._waiting: deque[tuple[float, Action]] = deque()
        self.seconds = 0.0

    def do(self, seconds: float, action: Action) -> None:
        """When it is its turn: so many seconds of work, and then the action."""
        self._waiting.append((seconds, action))
        self._next()

    def go_on(self, seconds: float, action: Action) -> None:
        """From within an action: more of the same turn, before all others."""
        self._waiting.appendleft((seconds, action))

    def _next(self) -> None:
        while self._free and self._waiting:
            seconds, action = self._waiting.popleft()
            self._free -= 1
            if seconds:
                now = self._clock.now
                self.seconds += max(0.0, min(now + seconds, self._lasts) - now)
                self._clock.at(now + seconds, partial(self._end, action))
            else:
                action()
                self._free += 1

    def _end(self, action: Action) -> None:
        action()
        self._free += 1
        self._next()


@dataclass(slots=True, eq=False)
class _Request:
    """What stands for the answer in the server's queue."""

    index: int
    arrival: Arrival
    missing: int
    over: bool = False


@dataclass(slots=True, eq=False)
class _Worker:
    """Batches that it has, the first of them at work: (entries, their tokens)."""

    batches: deque[tuple[list[Entry[_Request]], int]] = field(default_factory=deque)
    given: int = 0  # as the front knows it: answered ones are in its socket


class _Replica:
    """A server: one front, its workers."""

    def __init__(self, setup: Setup, clock: _Clock, outcome: Outcome) -> None:
        self._setup, self._clock, self._outcome = setup, clock, outcome
        self.loop = _Turns(clock, outcome.lasted)
        self._threads = _Turns(clock, outcome.lasted, _THREADS)
        self._queue: RequestQueue[_Request] = RequestQueue()
        self._workers = [_Worker() for _ in range(setup.workers)]
        self._under_way = 0
        self._scheduled = False
        self.open = 0
        self.worker_seconds = 0.0

    # Requests: as EmbeddingEngine.embed

    def receive(self, index: int, arrival: Arrival) -> None:
        self.open += 1
        request = _Request(index, arrival, len(arrival.tokens))
        self.loop.do(self._setup.front.read, partial(self._admit, request))

    def _admit(self, request: _Request) -> None:
        setup, tokens = self._setup, sum(request.arrival.tokens)
        expected = setup.expected(tokens)
        waiting = self._queue.num_tokens + self._under_way
        if waiting and waiting + expected > setup.max_queued_tokens:
            self._finish(request, 429)
            return
        seconds = setup.front.token * tokens
        if setup.is_short(tokens):
            self.loop.go_on(seconds, partial(self._submit, request))
            return
        self._under_way += expected

        tokenized = partial(self._tokenized, request, expected)
        self._threads.do(seconds, partial(self.loop.do, 0.0, tokenized))

    def _tokenized(self, request: _Request, expected: int) -> None:
        self._under_way -= expected
        self._submit(request)

    def _submit(self, request: _Request) -> None:
        now = self._clock.now
        first = request.index << 11  # no two inputs are equal
        deadline = request.arrival.at + self._setup.deadline
        encodings = [
            _encoding(first + place, tokens) for place, tokens in enumerate(request.arrival.tokens)
        ]
        queued = QueuedRequest.of(encodings, request, deadline=deadline, arrived=now)
        self._queue.append(queued)
        if deadline < math.inf:
            self._clock.at(max(now, deadline), partial(self._expire, queued))
        self._schedule()

    def _expire(self, queued: QueuedRequest[_Request]) -> None:
        if queued.queued:
            self._queue.discard(queued)
            self._finish(queued.answer, 504)

    def _finish(self, request: _Request, status: int) -> None:
        if request.over:
            return
        request.over = True
        self.open -= 1
        outcome, wire = self._outcome, self._setup.front.wire
        outcome.statuses[request.index] = status
        outcome.done[request.index] = self._clock.now + wire
        outcome.seconds[request.index] = self._clock.now + wire - request.arrival.at

    # Batches: as Batcher

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.loop.do(0.0, self._compose)

    def _compose(self) -> None:
        self._scheduled = False
        for depth in range(_CUDA_DEPTH):
            for worker in self._workers:
                if worker.given == depth and self._may_take(depth):
                    self._hand_over(worker)

    def _may_take(self, depth: int) -> bool:
        return depth == 0 or (self._setup.cuda and self._queue.is_full(self._setup.limits))

    def _hand_over(self, worker: _Worker) -> None:
        entries, expired = self._queue.next_batch(self._setup.limits, self._clock.now)
        for queued in expired:
            self._finish(queued.answer, 504)
        if not entries:
            return
        tokens = sum(map(len, entries))
        self._outcome.batches += 1
        self._outcome.batch_tokens += tokens
        worker.batches.append((entries, tokens))
        worker.given += 1
        if len(worker.batches) == 1:
            self._begin(worker)

    def _begin(self, worker: _Worker) -> None:
        entries, tokens = worker.batches[0]
        seconds = self._setup.cost.seconds(tokens, len(entries))
        begun = self._clock.now
        until = min(begun + seconds, self._outcome.lasted)
        self.worker_seconds += max(0.0, until - begun)
        self._clock.at(begun + seconds, partial(self._end, worker))

    def _end(self, worker: _Worker) -> None:
        entries, _ = worker.batches.popleft()
        if worker.batches:
            self._begin(worker)
        self.loop.do(0.0, partial(self._done, worker, entries))

    def _done(self, worker: _Worker, entries: Sequence[Entry[_Request]]) -> None:
        """The next batch is composed before the answers are written."""
        front = self._setup.front
        for entry in entries:
            request = entry.request.answer
            request.missing -= 1
            if not request.missing and not request.over:
                seconds = front.write + front.row * len(request.arrival.tokens)
                self.loop.do(seconds, partial(self._finish, request, 200))
        worker.given -= 1
        self._compose()


def _encoding(number: int, tokens: int) -> Encoding:
    ids = np.zeros(tokens, np.int32)
    ids[:2] = (number & 0x7FFFFFFF, number >> 31)[: min(tokens, 2)]
    return Encoding(ids)
