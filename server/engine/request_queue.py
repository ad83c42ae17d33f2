"""The waiting inputs, and which of them make the next batch.

Pure: no clock, event loop, torch or metrics; a time is an argument. Requests take turns, an input
at a time, so that one query never waits behind a request of 2,048 inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from model.batch import BatchLimits, Encoding

_LOOK_AHEAD = 32
"""How many requests whose next input does not fit are passed over before a batch is closed."""

Waiter = TypeVar("Waiter")
"""What stands for the answer of a request; the queue carries it and never looks at it."""


@dataclass(slots=True, eq=False)
class Entry(Generic[Waiter]):
    """One input of a request, waiting or in a batch."""

    encoding: Encoding
    index: int  # its place in the request
    request: QueuedRequest[Waiter]
    deaths: int = 0  # how many workers died with it in the batch that they ran
    deaths_alone: int = 0  # and how many of them with nothing else in the batch
    alone: bool = False  # it must have its batch to itself
    key: bytes = field(init=False, repr=False)  # of the encoding: equal for equal inputs only

    def __post_init__(self) -> None:
        self.key = self.encoding.key  # copies all ids, and is asked for at every composition

    def __len__(self) -> int:
        return len(self.encoding)


@dataclass(slots=True, eq=False)
class QueuedRequest(Generic[Waiter]):
    """The inputs of one HTTP request that are still waiting, and what is known of its client."""

    waiter: Waiter
    deadline: float = float("inf")  # on the caller's clock
    arrived: float = 0.0  # on the caller's clock
    waiting: deque[Entry[Waiter]] = field(default_factory=deque)
    num_tokens: int = 0  # of the inputs that wait in the queue
    queued: bool = False  # whether the queue holds it
    is_query: bool = False  # one input was to be computed, and its vector is all that is missing

    @classmethod
    def of(
        cls,
        encodings: Sequence[Encoding],
        waiter: Waiter,
        *,
        deadline: float = float("inf"),
        arrived: float = 0.0,
        but: Collection[int] = (),
    ) -> QueuedRequest[Waiter]:
        """but: indices of encodings whose vectors are known already."""
        request = cls(waiter, deadline, arrived)
        request.waiting.extend(
            Entry(e, i, request) for i, e in enumerate(encodings) if i not in but
        )
        request.is_query = len(request.waiting) == 1
        return request


class RequestQueue(Generic[Waiter]):
    """Requests in the order of their turns."""

    def __init__(self) -> None:
        self._turns: deque[QueuedRequest[Waiter]] = deque()
        self.num_tokens = 0
        self.num_entries = 0

    def __repr__(self) -> str:
        return (
            f"RequestQueue({len(self._turns)} requests, {self.num_entries} entries, "
            f"{self.num_tokens} tokens)"
        )

    @property
    def num_requests(self) -> int:
        return len(self._turns)

    def append(self, request: QueuedRequest[Waiter]) -> None:
        """Admit all entries of a request, at the end of the turns."""
        assert request.waiting, request
        assert not request.queued, request
        request.queued = True
        self._turns.append(request)
        self._count(request.waiting, 1)

    def put_back(self, entries: Iterable[Entry[Waiter]]) -> None:
        """Return entries of a batch that was lost to the front, in their order."""
        for entry in reversed(list(entries)):
            request = entry.request
            request.waiting.appendleft(entry)
            self._count((entry,), 1)
            if request.queued:
                self._turns.remove(request)
            request.queued = True
            self._turns.appendleft(request)

    def discard(self, request: QueuedRequest[Waiter]) -> None:
        """Drop what still waits of a request; harmless when nothing does."""
        if request.queued:
            self._turns.remove(request)
            self._drop(request)

    def clear(self) -> list[QueuedRequest[Waiter]]:
        """Drop everything that waits; returns the requests."""
        requests = list(self._turns)
        self._turns.clear()
        for request in requests:
            self._drop(request)
        return requests

    def equal_to(self, key: bytes) -> list[Entry[Waiter]]:
        """The entries that wait with this key."""
        waiting = (entry for request in self._turns for entry in request.waiting)
        return [entry for entry in waiting if entry.key == key]

    def is_full(self, limits: BatchLimits) -> bool:
        """Whether what waits fills a batch: it reaches the token or the sequence limit."""
        return self.num_tokens >= limits.max_tokens or self.num_entries >= limits.max_seqs

    def next_batch(
        self, limits: BatchLimits, now: float, at_work: Collection[bytes] = ()
    ) -> tuple[list[Entry[Waiter]], list[QueuedRequest[Waiter]]]:
        """Take the entries of one batch; also returns the requests whose deadline has passed,
        which are dropped.

        One entry of each request in turn, while they fit. A request whose next entry does not
        fit keeps its turn: it comes first in the next batch, so nothing starves. An entry longer
        than a whole batch runs alone, and so does one that is marked so.

        Once a query (a request of one input) is taken, requests with more tokens than the batch
        has room for add to it only until they make up half of a full one: the query is back the
        sooner. DECISIONS.md has what that costs them.

        Of equal inputs (`Encoding.key`) the first alone counts against the limits, and those that
        equal one in `at_work` don't: they come along, since they cost nothing.
        """
        batch: list[Entry[Waiter]] = []
        expired: list[QueuedRequest[Waiter]] = []
        passed_over: list[QueuedRequest[Waiter]] = []
        seen: set[bytes] = set()
        tokens = partial = 0  # partial: of requests that the batch leaves unfinished
        has_query = False
        while self._turns and len(seen) < limits.max_seqs and tokens < limits.max_tokens:
            request = self._turns.popleft()
            if request.deadline <= now:
                self._drop(request)
                expired.append(request)
                continue
            following = request.waiting[0]
            key = following.key
            cost = 0 if key in seen or key in at_work else len(following)
            room = limits.max_tokens - tokens
            too_much = has_query and partial + cost > limits.max_tokens // 2
            held_back = too_much and request.num_tokens > room
            fits = not cost or (cost <= room and not held_back)
            if following.alone:
                cost, fits = len(following), False
            if seen and not fits:
                passed_over.append(request)
                if len(passed_over) == _LOOK_AHEAD:
                    break
                continue
            entry = request.waiting.popleft()
            self._count((entry,), -1)
            batch.append(entry)
            tokens += cost
            has_query |= request.is_query and key not in at_work
            if cost:
                seen.add(key)
            if request.waiting:
                self._turns.append(request)
                partial += cost
            else:
                request.queued = False
            if entry.alone:
                break
        self._turns.extendleft(reversed(passed_over))
        return batch, expired

    def _drop(self, request: QueuedRequest[Waiter]) -> None:
        self._count(request.waiting, -1)
        request.waiting.clear()
        request.queued = False

    def _count(self, entries: Iterable[Entry[Waiter]], sign: int) -> None:
        for entry in entries:
            entry.request.num_tokens += sign * len(entry)
            self.num_tokens += sign * len(entry)
            self.num_entries += sign
