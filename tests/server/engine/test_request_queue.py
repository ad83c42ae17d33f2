"""The pure queue: limits, turns, order, dropped entries; nothing lost, nobody starved."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import BatchLimits, Encoding
from server.engine.request_queue import QueuedRequest, RequestQueue

LIMITS = BatchLimits(max_tokens=10, max_seqs=4)


_NUMBERS = itertools.count()


def request(
    name: str, *lengths: int, deadline: float = float("inf"), priority: int = 0
) -> QueuedRequest[str]:
    """Inputs of these lengths, no two alike."""
    encodings = [Encoding(np.full(length, next(_NUMBERS), dtype=np.int32)) for length in lengths]
    return QueuedRequest.of(encodings, name, deadline=deadline, priority=priority)


def queue_of(*requests: QueuedRequest[str]) -> RequestQueue[str]:
    queue: RequestQueue[str] = RequestQueue()
    for one in requests:
        queue.append(one)
    return queue


def take(queue: RequestQueue[str], limits: BatchLimits = LIMITS) -> list[str]:
    """The next batch as name + index."""
    entries, _ = queue.next_batch(limits, now=0.0)
    return [f"{entry.request.answer}{entry.index}" for entry in entries]


def test_an_empty_queue_gives_an_empty_batch() -> None:
    queue = queue_of()
    assert take(queue) == []
    assert repr(queue) == "RequestQueue(0 requests, 0 entries, 0 tokens)"


def test_one_request_in_its_order() -> None:
    queue = queue_of(request("a", 4, 4, 4, 4))
    assert repr(queue) == "RequestQueue(1 requests, 4 entries, 16 tokens)"
    assert take(queue) == ["a0", "a1"]
    assert take(queue) == ["a2", "a3"]
    assert repr(queue) == "RequestQueue(0 requests, 0 entries, 0 tokens)"


def test_the_sequence_limit() -> None:
    assert take(queue_of(request("a", 1, 1, 1, 1, 1))) == ["a0", "a1", "a2", "a3"]


def test_requests_take_turns() -> None:
    queue = queue_of(request("a", 2, 2, 2, 2), request("b", 2, 2), request("c", 2, 2))
    assert take(queue) == ["a0", "b0", "c0", "a1"]
    assert take(queue) == ["b1", "c1", "a2", "a3"]


def test_a_newcomer_is_in_the_next_batch() -> None:
    queue = queue_of(request("bulk", *[5] * 100))
    assert take(queue) == ["bulk0", "bulk1"]
    queue.append(request("query", 3))
    assert "query0" in take(queue)


TWENTY = BatchLimits(max_tokens=20, max_seqs=100)


def test_beside_a_query_unfinished_requests_make_up_half_a_batch() -> None:
    queue = queue_of(request("bulk", *[3] * 100), request("query", 2), request("list", 2, 2))
    assert take(queue, TWENTY) == ["bulk0", "query0", "list0", "bulk1", "list1"]
    assert take(queue, TWENTY) == [f"bulk{i}" for i in range(2, 8)], "no query, a whole batch"
    queue.append(request("query", 2))
    assert take(queue, TWENTY) == ["bulk8", "query0", "bulk9", "bulk10"]


@pytest.mark.parametrize(("queries", "of_bulk"), [(0, 10), (1, 5), (3, 5), (6, 4), (8, 2), (9, 1)])
def test_a_large_request_has_its_half_of_each_batch(queries: int, of_bulk: int) -> None:
    queue = queue_of(request("bulk", *[2] * 100))
    for _ in range(5):
        for _ in range(queries):
            queue.append(request("query", 2))
        taken = take(queue, TWENTY)
        assert sum(name == "query0" for name in taken) == queries
        assert sum(name.startswith("bulk") for name in taken) == of_bulk


def test_a_query_that_is_at_work_halves_nothing() -> None:
    queue = queue_of(equal("query", 1, 9), request("bulk", *[2] * 100))
    entries, _ = queue.next_batch(TWENTY, 0.0, {Encoding(np.full(6, 9, dtype=np.int32)).key})
    assert len(entries) == 1 + 10


def test_where_halving_is_off_a_query_rides_in_a_whole_batch() -> None:
    whole = BatchLimits(max_tokens=20, max_seqs=100, half_beside_query=False)
    queue = queue_of(request("query", 2), request("bulk", *[3] * 100))
    assert take(queue, whole) == ["query0", *(f"bulk{i}" for i in range(6))]
    queue = queue_of(request("query", 2), request("bulk", *[3] * 100))
    assert take(queue, TWENTY) == ["query0", "bulk0", "bulk1", "bulk2"]


def test_a_query_is_what_has_one_input_to_compute() -> None:
    encodings = [Encoding(np.full(2, next(_NUMBERS), dtype=np.int32)) for _ in range(3)]
    for known, is_query in ({}, False), ({0}, False), ({0, 2}, True), ({1, 2}, True):
        assert QueuedRequest.of(encodings, "a", known=known).is_query is is_query
    bulk = request("bulk", *[2] * 100)
    queue = queue_of(bulk)
    entries, _ = queue.next_batch(BatchLimits(2, 1), 0.0)
    assert take(queue, TWENTY) == [f"bulk{i}" for i in range(1, 11)]
    queue.put_back(entries)
    assert take(queue, TWENTY) == ["bulk0", *(f"bulk{i}" for i in range(11, 20))]


def test_equal_inputs_cost_nothing_beyond_the_half_either() -> None:
    queue = queue_of(request("query", 2), equal("bulk", 100, 9, length=9))
    assert len(take(queue, TWENTY)) == 1 + 100
    assert repr(queue) == "RequestQueue(0 requests, 0 entries, 0 tokens)"


def test_what_does_not_fit_comes_first_next_time() -> None:
    queue = queue_of(request("a", 6), request("b", 7), request("c", 3))
    assert take(queue) == ["a0", "c0"]
    queue.append(request("d", 4))
    assert take(queue) == ["b0"]
    assert take(queue) == ["d0"]


def test_a_sequence_longer_than_a_batch_runs_alone() -> None:
    queue = queue_of(request("long", 50), request("b", 1))
    assert take(queue) == ["long0"]
    assert take(queue) == ["b0"]
    queue = queue_of(request("b", 1), request("long", 50), request("c", 1))
    assert take(queue) == ["b0", "c0"]
    assert take(queue) == ["long0"]


def test_put_back_comes_first_and_keeps_the_order() -> None:
    queue = queue_of(request("a", 5, 5, 5), request("b", 5))
    entries, _ = queue.next_batch(LIMITS, now=0.0)
    assert [entry.index for entry in entries] == [0, 0]
    queue.put_back(entries)
    assert (queue.num_entries, queue.num_tokens) == (4, 20)
    assert [e.request.num_tokens for e in entries] == [15, 5]
    assert take(queue) == ["a0", "b0"]
    assert take(queue) == ["a1", "a2"]


def test_put_back_of_a_request_that_had_left_the_queue() -> None:
    queue = queue_of(request("a", 5))
    entries, _ = queue.next_batch(LIMITS, now=0.0)
    queue.append(request("b", 5))
    queue.put_back(entries)
    assert take(queue) == ["a0", "b0"]


def test_discard_frees_what_waits() -> None:
    a, b = request("a", 3, 3), request("b", 3)
    queue = queue_of(a, b)
    queue.discard(a)
    queue.discard(a)  # harmless
    assert (queue.num_requests, queue.num_entries, queue.num_tokens) == (1, 1, 3)
    assert take(queue) == ["b0"]


def test_expired_requests_are_dropped_and_reported() -> None:
    late, fine = request("late", 2, 2, deadline=5.0), request("fine", 2, deadline=6.0)
    queue = queue_of(late, fine)
    entries, expired = queue.next_batch(LIMITS, now=5.0)
    assert [entry.request for entry in entries] == [fine]
    assert expired == [late]
    assert (queue.num_entries, queue.num_tokens) == (0, 0)


def test_full_means_that_what_waits_reaches_a_limit() -> None:
    queue = queue_of(request("a", 9))
    assert not queue.is_full(LIMITS)
    queue.append(request("b", 1))
    assert queue.is_full(LIMITS)
    assert queue_of(request("a", 1, 1, 1, 1)).is_full(LIMITS)


lengths = st.lists(st.integers(1, 14), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(lengths, max_size=12),
    levels=st.lists(st.integers(-2, 2), min_size=12, max_size=12),
    discarded=st.sets(st.integers(0, 11)),
)
def test_nothing_is_lost_repeated_or_too_large(
    requests: list[list[int]], levels: list[int], discarded: set[int]
) -> None:
    all_requests = [
        request(str(i), *sizes, priority=level)
        for i, (sizes, level) in enumerate(zip(requests, levels, strict=False))
    ]
    queue = queue_of(*all_requests)
    for index in discarded:
        if index < len(all_requests):
            queue.discard(all_requests[index])
    seen = []
    while queue.num_entries:
        entries, _ = queue.next_batch(LIMITS, now=0.0)
        assert entries, "a queue that holds something gives something"
        assert len(entries) <= LIMITS.max_seqs
        assert len(entries) == 1 or sum(map(len, entries)) <= LIMITS.max_tokens
        seen += [(entry.request.answer, entry.index) for entry in entries]
    expected = [
        (str(i), index)
        for i, sizes in enumerate(requests)
        if i not in discarded
        for index in range(len(sizes))
    ]
    assert sorted(seen) == sorted(expected)
    assert queue.num_tokens == 0
    assert queue.num_requests == 0


@settings(max_examples=100, deadline=None)
@given(
    first=st.integers(1, 14),
    rivals=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    ahead=st.integers(0, 6),
)
def test_nobody_starves(first: int, rivals: list[int], ahead: int) -> None:
    """However others keep coming, an entry runs once those before it have each had a turn."""
    queue = queue_of(*[request("rival", *rivals) for _ in range(ahead)], request("me", first))
    for _ in range(ahead + 2):
        if "me0" in take(queue):
            return
        queue.append(request("rival", *rivals))
    raise AssertionError("passed over for too long")


def test_lower_levels_come_first_and_share_the_room_that_is_left() -> None:
    queue = queue_of(
        request("low", 3, 3, priority=5), request("a", 3, 3), request("high", 3, priority=-1)
    )
    assert [take(queue), take(queue)] == [["high0", "a0", "a1"], ["low0", "low1"]]


def test_requests_of_one_level_take_turns() -> None:
    queue = queue_of(request("a", 2, 2, 2, priority=3), request("b", 2, 2, priority=3))
    assert take(queue) == ["a0", "b0", "a1", "b1"]


@pytest.mark.parametrize("rivals", [1, 3])
def test_no_level_starves(rivals: int) -> None:
    """However others keep coming, each level has a whole batch now and then."""
    queue = queue_of(*[request(f"low{n}", 9, priority=n) for n in range(1, rivals + 1)])
    batches = []
    while queue.num_entries:
        queue.append(request("high", 9))
        batches.append(take(queue)[0])
        assert len(batches) < 20, "a level waits for ever"
        if any(b.startswith(f"low{rivals}") for b in batches):
            break
    assert [b for b in batches if b.startswith("low")] == [f"low{n}0" for n in range(1, rivals + 1)]
    assert batches[:8] == ["high0"] * 8, "and not before its time"


def test_a_level_that_is_put_back_keeps_its_place() -> None:
    queue = queue_of(request("low", 9, priority=1), request("high", 9))
    entries, _ = queue.next_batch(LIMITS, 0.0)
    queue.append(request("later", 9))
    queue.put_back(entries)
    assert [take(queue) for _ in range(3)] == [["high0"], ["later0"], ["low0"]]
    assert (queue.num_requests, queue.num_tokens) == (0, 0)


def equal(name: str, count: int, number: int, length: int = 6) -> QueuedRequest[str]:
    return QueuedRequest.of([Encoding(np.full(length, number, dtype=np.int32))] * count, name)


def test_equal_inputs_count_once() -> None:
    queue = queue_of(equal("a", 3, 9), equal("b", 2, 9), request("c", 4, 4))
    assert take(queue) == ["a0", "b0", "c0"], "the batch is full: 6 and 4 of 10"
    queue = queue_of(equal("a", 3, 9), equal("b", 2, 9), request("c", 3))
    assert take(queue) == ["a0", "b0", "c0", "a1", "b1", "a2"], "9 of 10: all equal ones fit"
    assert queue.num_tokens == 0


def test_what_is_at_work_costs_nothing() -> None:
    queue = queue_of(request("a", 10), equal("b", 2, 9))
    key = Encoding(np.full(6, 9, dtype=np.int32)).key
    entries, _ = queue.next_batch(LIMITS, 0.0, {key})
    assert [entry.request.answer for entry in entries] == ["a"], "full"
    entries, _ = queue.next_batch(LIMITS, 0.0, {key})
    assert len(entries) == 2


def test_an_equal_input_that_must_be_alone_is() -> None:
    suspect = equal("b", 1, 9)
    suspect.waiting[0].alone = True
    queue = queue_of(equal("a", 1, 9), suspect, equal("c", 1, 9))
    assert [take(queue), take(queue)] == [["a0", "c0"], ["b0"]]
