"""What is counted without the library, against the library; and what is read of workers."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from server.engine.loop_lag import LoopLag
from server.engine.metrics import Metrics
from server.engine.tallies import Counts, Tally
from server.engine.worker_tallies import BUILD

BOUNDS = (0.001, 0.5, 1, 16384)


def told(registry: CollectorRegistry) -> list[str]:
    """What Prometheus reads, but for when a series was made."""
    text = generate_latest(registry).decode()
    return [line for line in text.splitlines() if "_created" not in line]


@given(st.lists(st.one_of(st.floats(0, 1e6), st.sampled_from(BOUNDS)), max_size=30))
def test_a_tally_tells_what_the_library_s_histogram_does(values: list[float]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally("x_seconds", "Some.", BOUNDS)
    ours.register(tally)
    histogram = Histogram("x_seconds", "Some.", registry=theirs, buckets=BOUNDS)
    for value in values:
        tally.observe(value)
        histogram.observe(value)
    assert told(ours) == told(theirs)
    assert tally.count == len(values)


def test_counts_tell_what_the_library_s_counter_does() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counts = Counts("x", "Some.", ("why",))
    ours.register(counts)
    for why in "ab":
        counts.labels(why)
    counter = Counter("x", "Some.", ("why",), registry=theirs)
    for why in "ab":
        counter.labels(why)
    counts.add("b")
    counter.labels("b").inc()
    counts.add("b", 2.5)
    counter.labels("b").inc(2.5)
    assert told(ours) == told(theirs)
    with pytest.raises(KeyError):
        counts.add("c")


def test_what_is_read_of_workers() -> None:
    metrics, builds = Metrics(), [("1.0", "m", "", "float32", "none", "sdpa", "a GPU")] * 2
    metrics.show_workers(["cuda:0", "cuda:1"], lambda: builds)
    first, _ = metrics.workers
    first.busy_seconds, first.batches, first.start_seconds, first.device_bytes = 2.5, 3, 19.0, 4
    first.pid = os.getpid()
    text = "\n".join(told(metrics.registry))
    for name, value in (
        ("busy_seconds_total", "2.5"),
        ("batches_total", "3.0"),
        ("start_seconds", "19.0"),
        ("device_memory_bytes", "4.0"),
    ):
        for worker, shown in (("0", value), ("1", "0.0")):
            labels = f'{{device="cuda:{worker}",worker="{worker}"}}'
            assert f"nv_embed_worker_{name}{labels} {shown}" in text
    assert 1e7 < first.memory_bytes < 1e11
    assert metrics.workers[1].memory_bytes == 0
    first.pid = 2**22 + 1  # no process has this number
    assert first.memory_bytes == 0
    assert text.count("nv_embed_build_info{") == 1, "equal workers are one series"
    assert len(BUILD) == len(builds[0])


def test_a_loop_that_is_held_up_is_seen_to_be() -> None:
    tally = Tally("x", "", (0.1,))

    async def run() -> None:
        lag = LoopLag(tally)
        lag.start()
        while not tally.count:
            time.sleep(0.3)  # noqa: ASYNC251  (that is what is to be seen)
            await asyncio.sleep(0)
        lag.stop()
        seen = tally.count
        await asyncio.sleep(0.6)
        assert tally.count == seen

    asyncio.run(run())
    assert tally.sum > 0.02, "0.3 s after it was asked for 0.25"
