"""The waiting inputs, and which of them make the next batch.

Pure: no clock, event loop, torch or metrics; a time is an argument. Requests take turns, an input
at a time, so that one query never waits behind a request of 2,048 inputs; and before them so do the
names of keys. A level of priority comes
before all higher numbers, but for every so many batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

from model.batch import BatchLimits, Encoding, continues
from server.engine.key_turns import KeyTurns

_LOOK_AHEAD = 32
"""How many requests whose next input does not fit are passed over before a batch is closed."""
_MOST_PASSED = 8
"""After so many batches in a row that had no place for a level of priority, it comes first."""

AnswerT = TypeVar("AnswerT")
"""What stands for the answer of a request; the queue carries it and never looks at it."""


@dataclass(slots=True, eq=False)
class Entry(Generic[AnswerT]):
    """One input of a request, waiting or in a batch."""

    encoding: Encoding
    index: int  # its place in the request
    request: QueuedRequest[AnswerT]
    continues: bool = False  # a span of the sequence of the entry before it
    deaths: int = 0  # how many workers died with it in the batch that they ran
    deaths_alone: int = 0  # and how many of them with nothing else in the batch
    alone: bool = False  # it must have its batch to itself
    key: bytes = field(init=False, repr=False)  # equal for equal inputs of one salt only

    def __post_init__(self) -> None:
        # Copies all ids, and is asked for at every composition.
        self.key = self.request.salt + self.encoding.key

    def __len__(self) -> int:
        """Tokens that it adds to those before it."""
        return 0 if self.continues else len(self.encoding)

    @property
    def input(self) -> int:
        """Which of the request's inputs it is of."""
        return self.encoding.input(self.index)


@dataclass(slots=True, eq=False)
class QueuedRequest(Generic[AnswerT]):
    """The inputs of one HTTP request that are still waiting, and what is known of its client."""

    answer: AnswerT
    deadline: float = float("inf")  # on the caller's clock
    arrived: float = 0.0  # on the caller's clock
    priority: int = 0  # the lower the sooner
    salt: bytes = b""  # vectors are shared with requests of the same one alone
    waiting: deque[Entry[AnswerT]] = field(default_factory=deque)
    num_tokens: int = 0  # of the inputs that wait in the queue
    queued: bool = False  # whether the queue holds it
    is_query: bool = False  # one input was to be computed, and its vector is all that is missing
    key_name: str = ""  # of the key that it came with
    begun: float = 0.0  # when its first input went to a worker, on the caller's clock

    @classmethod
    def of(
        cls,
        encodings: Sequence[Encoding],
        answer: AnswerT,
        *,
        deadline: float = float("inf"),
        arrived: float = 0.0,
        known: Collection[int] = (),
        priority: int = 0,
        salt: bytes = b"",
        key_name: str = "",
    ) -> QueuedRequest[AnswerT]:
        """known: indices of encodings whose vectors are known already."""
        request = cls(answer, deadline, arrived, priority, salt, key_name=key_name)
        before: Encoding | None = None
        for index, encoding in enumerate(encodings):
            if index not in known:
                entry = Entry(encoding, index, request, continues(encoding, before))
                request.waiting.append(entry)
                before = encoding
        request.is_query = len(request.waiting) == 1
        return request


class RequestQueue(Generic[AnswerT]):
    """Requests by level of priority, in the order of their turns."""

    def __init__(self) -> None:
        self._levels: dict[int, KeyTurns[QueuedRequest[AnswerT]]] = {}
        self._passed: dict[int, int] = {}  # level -> batches in a row that took nothing of it
        self.num_tokens = 0
        self.num_entries = 0

    def __repr__(self) -> str:
        return (
            f"RequestQueue({self.num_requests} requests, {self.num_entries} entries, "
            f"{self.num_tokens} tokens)"
        )

    @property
    def num_requests(self) -> int:
        return sum(map(len, self._levels.values()))

    def append(self, request: QueuedRequest[AnswerT]) -> None:
        """Admit all entries of a request, at the end of its level's turns."""
        assert request.waiting, request
        assert not request.queued, request
        request.queued = True
        self._turns_beside(request).append(request)
        self._count(request.waiting, 1)

    def put_back(self, entries: Iterable[Entry[AnswerT]]) -> None:
        """Return entries of a batch that was lost to the front, in their order."""
        for entry in reversed(list(entries)):
            request = entry.request
            request.waiting.appendleft(entry)
            self._count((entry,), 1)
            turns = self._turns_beside(request)
            if request.queued:
                turns.remove(request)
            request.queued = True
            turns.appendleft(request)

    def discard(self, request: QueuedRequest[AnswerT]) -> None:
        """Drop what still waits of a request; harmless when nothing does."""
        if request.queued:
            self._turns_beside(request).remove(request)
            self._drop(request)

    def clear(self) -> list[QueuedRequest[AnswerT]]:
        """Drop everything that waits; returns the requests."""
        requests = list(self._requests())
        self._levels.clear()
        self._passed.clear()
        for request in requests:
            self._drop(request)
        return requests

    def equal_to(self, key: bytes) -> list[Entry[AnswerT]]:
        """The entries that wait with this key."""
        waiting = (entry for request in self._requests() for entry in request.waiting)
        return [entry for entry in waiting if entry.key == key]

    def is_full(self, limits: BatchLimits) -> bool:
        """Whether what waits fills a batch: it reaches the token or the sequence limit."""
        return self.num_tokens >= limits.max_tokens or self.num_entries >= limits.max_seqs

    def next_batch(
        self, limits: BatchLimits, now: float, at_work: Collection[bytes] = ()
    ) -> tuple[list[Entry[AnswerT]], list[QueuedRequest[AnswerT]]]:
        """Take the entries of one batch; also returns the requests whose deadline has passed,
        which are dropped.

        Level by level, and in each one entry of each request in turn, and of each name's, of those
        that may join (see _Composition). at_work: keys of inputs that are being computed.
        """
        composition: _Composition[AnswerT] = _Composition(limits, at_work)
        expired: list[QueuedRequest[AnswerT]] = []
        for level in self._in_order():
            taken = len(composition.entries)
            self._fill(composition, self._levels[level], now, expired)
            starved = len(composition.entries) == taken
            self._passed[level] = self._passed.get(level, 0) + 1 if starved else 0
            if not self._levels[level]:
                del self._levels[level], self._passed[level]  # what comes next waits anew
        return composition.entries, expired

    def _in_order(self) -> list[int]:
        """The levels, those that were passed over for long first."""
        passed = self._passed
        return sorted(self._levels, key=lambda level: (passed.get(level, 0) < _MOST_PASSED, level))

    def _fill(
        self,
        composition: _Composition[AnswerT],
        turns: KeyTurns[QueuedRequest[AnswerT]],
        now: float,
        expired: list[QueuedRequest[AnswerT]],
    ) -> None:
        """With what may join. A request whose next entry may not keeps its turn: it comes first in
        the next batch, so nothing starves."""
        passed_over: list[QueuedRequest[AnswerT]] = []
        while turns and composition.is_open and len(passed_over) < _LOOK_AHEAD:
            request = turns.popleft()
            if request.deadline <= now:
                self._drop(request)
                expired.append(request)
            elif composition.may_join(request.waiting[0]):
                self._take_first(request, composition)
                while request.waiting and composition.goes_with_last(request.waiting[0]):
                    self._take_first(request, composition)
                request.queued = bool(request.waiting)
                if request.queued:
                    turns.append(request)
            else:
                passed_over.append(request)
        for request in reversed(passed_over):
            turns.appendleft(request)

    def _take_first(
        self, request: QueuedRequest[AnswerT], composition: _Composition[AnswerT]
    ) -> None:
        entry = request.waiting.popleft()
        self._count((entry,), -1)
        composition.add(entry)

    def _requests(self) -> Iterator[QueuedRequest[AnswerT]]:
        return chain.from_iterable(self._levels.values())

    def _turns_beside(self, request: QueuedRequest[AnswerT]) -> KeyTurns[QueuedRequest[AnswerT]]:
        return self._levels.setdefault(request.priority, KeyTurns())

    def _drop(self, request: QueuedRequest[AnswerT]) -> None:
        self._count(request.waiting, -1)
        request.waiting.clear()
        request.queued = False

    def _count(self, entries: Iterable[Entry[AnswerT]], sign: int) -> None:
        for entry in entries:
            entry.request.num_tokens += sign * len(entry)
            self.num_tokens += sign * len(entry)
            self.num_entries += sign


class _Composition(Generic[AnswerT]):
    """A batch in the making: each policy of what may join it is a predicate of its own."""

    def __init__(self, limits: BatchLimits, at_work: Collection[bytes]) -> None:
        self.entries: list[Entry[AnswerT]] = []
        self._limits, self._at_work = limits, at_work
        self._keys: set[bytes] = set()  # of what is computed in it
        self._tokens = 0
        self._partial = 0  # tokens of requests that it leaves unfinished
        self._has_query = self._is_lone = False

    @property
    def is_open(self) -> bool:
        limits = self._limits
        full = len(self._keys) >= limits.max_seqs or self._tokens >= limits.max_tokens
        return not (full or self._is_lone)

    def may_join(self, entry: Entry[AnswerT]) -> bool:
        if not self._keys:
            return True  # alone, if it is longer than a whole batch
        if entry.alone:
            return False
        return self._is_free(entry) or (self._has_room(entry) and not self._is_held_back(entry))

    def goes_with_last(self, entry: Entry[AnswerT]) -> bool:
        """The spans of a sequence go together, in one forward of it."""
        return entry.continues and not (entry.alone or self._is_lone)

    def add(self, entry: Entry[AnswerT]) -> None:
        if not self._is_free(entry):
            self._keys.add(entry.key)
            self._tokens += len(entry)
            if len(entry.request.waiting):
                self._partial += len(entry)
        self._has_query |= entry.request.is_query and entry.key not in self._at_work
        self._is_lone = entry.alone
        self.entries.append(entry)

    def _is_free(self, entry: Entry[AnswerT]) -> bool:
        """Of equal inputs one is computed, in this batch or in one that is out."""
        return not entry.alone and (entry.key in self._keys or entry.key in self._at_work)

    def _has_room(self, entry: Entry[AnswerT]) -> bool:
        return self._tokens + len(entry) <= self._limits.max_tokens

    def _is_held_back(self, entry: Entry[AnswerT]) -> bool:
        """Once a query (a request of one input) is aboard, requests with more tokens than there is
        room for fill up half of a batch at most: the query is back the sooner. DECISIONS.md has
        what that costs them; it is measured on CPUs alone."""
        if not (self._has_query and self._limits.half_beside_query):
            return False
        most = self._limits.max_tokens
        too_much = self._partial + len(entry) > most // 2
        return too_much and entry.request.num_tokens > most - self._tokens
