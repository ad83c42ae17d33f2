"""The waiting inputs, and which of them make the next batch.

Pure: no clock, event loop, torch or metrics; a time is an argument. Requests take turns, an input
at a time, so that one query never waits behind a request of 2,048 inputs; and so do the names of
keys, a request at a time, so that nobody waits behind all requests of another.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from model.batch import BatchLimits, Encoding

_LOOK_AHEAD = 32
"""How many requests whose next input does not fit are passed over before a batch is closed."""

AnswerT = TypeVar("AnswerT")
"""What stands for the answer of a request; the queue carries it and never looks at it."""


@dataclass(slots=True, eq=False)
class Entry(Generic[AnswerT]):
    """One input of a request, waiting or in a batch."""

    encoding: Encoding
    index: int  # its place in the request
    request: QueuedRequest[AnswerT]
    deaths: int = 0  # how many workers died with it in the batch that they ran
    deaths_alone: int = 0  # and how many of them with nothing else in the batch
    alone: bool = False  # it must have its batch to itself
    key: bytes = field(init=False, repr=False)  # of the encoding: equal for equal inputs only

    def __post_init__(self) -> None:
        self.key = self.encoding.key  # copies all ids, and is asked for at every composition

    def __len__(self) -> int:
        return len(self.encoding)


@dataclass(slots=True, eq=False)
class QueuedRequest(Generic[AnswerT]):
    """The inputs of one HTTP request that are still waiting, and what is known of its client."""

    answer: AnswerT
    deadline: float = float("inf")  # on the caller's clock
    arrived: float = 0.0  # on the caller's clock
    waiting: deque[Entry[AnswerT]] = field(default_factory=deque)
    num_tokens: int = 0  # of the inputs that wait in the queue
    queued: bool = False  # whether the queue holds it
    is_query: bool = False  # one input was to be computed, and its vector is all that is missing
    key_name: str = ""  # of the key that it came with

    @classmethod
    def of(
        cls,
        encodings: Sequence[Encoding],
        answer: AnswerT,
        *,
        deadline: float = float("inf"),
        arrived: float = 0.0,
        known: Collection[int] = (),
        key_name: str = "",
    ) -> QueuedRequest[AnswerT]:
        """known: indices of encodings whose vectors are known already."""
        request = cls(answer, deadline, arrived, key_name=key_name)
        request.waiting.extend(
            Entry(e, i, request) for i, e in enumerate(encodings) if i not in known
        )
        request.is_query = len(request.waiting) == 1
        return request


class RequestQueue(Generic[AnswerT]):
    """Requests in the order of their turns."""

    def __init__(self) -> None:
        # By the name of their key; names, and the requests of each, in the order of their turns.
        self._turns: OrderedDict[str, deque[QueuedRequest[AnswerT]]] = OrderedDict()
        self.num_tokens = 0
        self.num_entries = 0

    def __repr__(self) -> str:
        return (
            f"RequestQueue({self.num_requests} requests, {self.num_entries} entries, "
            f"{self.num_tokens} tokens)"
        )

    @property
    def num_requests(self) -> int:
        return sum(map(len, self._turns.values()))

    def append(self, request: QueuedRequest[AnswerT]) -> None:
        """Admit all entries of a request, at the end of the turns."""
        assert request.waiting, request
        assert not request.queued, request
        self._add(request)
        self._count(request.waiting, 1)

    def put_back(self, entries: Iterable[Entry[AnswerT]]) -> None:
        """Return entries of a batch that was lost to the front, in their order."""
        for entry in reversed(list(entries)):
            request = entry.request
            request.waiting.appendleft(entry)
            self._count((entry,), 1)
            if request.queued:
                self._remove(request)
            self._add_first(request)

    def discard(self, request: QueuedRequest[AnswerT]) -> None:
        """Drop what still waits of a request; harmless when nothing does."""
        if request.queued:
            self._remove(request)
            self._drop(request)

    def clear(self) -> list[QueuedRequest[AnswerT]]:
        """Drop everything that waits; returns the requests."""
        requests = self._requests()
        self._turns.clear()
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

        One entry of each request in turn, of each name's in turn, of those that may join (see
        _Composition). A request whose next entry may not keeps its turn: it comes first in the next
        batch, so nothing starves. at_work: keys of inputs that are being computed.
        """
        composition: _Composition[AnswerT] = _Composition(limits, at_work)
        expired: list[QueuedRequest[AnswerT]] = []
        passed_over: list[QueuedRequest[AnswerT]] = []
        while self._turns and composition.is_open and len(passed_over) < _LOOK_AHEAD:
            request = self._take_turn()
            if request.deadline <= now:
                self._drop(request)
                expired.append(request)
            elif composition.may_join(request.waiting[0]):
                entry = request.waiting.popleft()
                self._count((entry,), -1)
                composition.add(entry)
                request.queued = bool(request.waiting)
                if request.queued:
                    self._add(request)
            else:
                passed_over.append(request)
        for request in reversed(passed_over):
            self._add_first(request)
        return composition.entries, expired

    def _requests(self) -> list[QueuedRequest[AnswerT]]:
        return [request for turns in self._turns.values() for request in turns]

    def _take_turn(self) -> QueuedRequest[AnswerT]:
        """The first request of the first name, which then comes last."""
        name, turns = next(iter(self._turns.items()))
        request = turns.popleft()
        if turns:
            self._turns.move_to_end(name)
        else:
            del self._turns[name]
        return request

    def _add(self, request: QueuedRequest[AnswerT]) -> None:
        request.queued = True
        self._turns.setdefault(request.key_name, deque()).append(request)

    def _add_first(self, request: QueuedRequest[AnswerT]) -> None:
        request.queued = True
        self._turns.setdefault(request.key_name, deque()).appendleft(request)
        self._turns.move_to_end(request.key_name, last=False)

    def _remove(self, request: QueuedRequest[AnswerT]) -> None:
        turns = self._turns[request.key_name]
        turns.remove(request)
        if not turns:
            del self._turns[request.key_name]

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
