"""The mirror of the metrics, against what stands in for Ray's classes."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from server.engine.tallies import Counts, Tally
from server.ray.metrics import Instruments, Mirror

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Recorder:
    """Makes instruments that refuse what Ray's refuse, and adds up what they are told."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.made: list[str] = []

    def instruments(self) -> Instruments:
        recorder = self

        class Instrument:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                assert description
                recorder.made.append(name)
                self._name, self._keys = name, set(tag_keys)

            def key(self, tags: dict[str, str]) -> tuple[str, frozenset[tuple[str, str]]]:
                assert set(tags) == self._keys
                return self._name, frozenset(tags.items())

            def set(self, value: float, tags: dict[str, str]) -> None:
                recorder.values[self.key(tags)] = value

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0
                key = self.key(tags)
                recorder.values[key] = recorder.values.get(key, 0) + value

        return Instruments(Instrument, Instrument)

    def value(self, name: str, **tags: str) -> float | None:
        return self.values.get((name, frozenset(tags.items())))


def test_each_kind_is_copied_and_counters_by_what_they_grew() -> None:
    registry, recorder = CollectorRegistry(), Recorder()
    requests = Counts("nv_embed_requests", "Requests", ("route", "status"))
    seconds = Tally("nv_embed_seconds", "Seconds", (0.1, 1))
    registry.register(requests)
    registry.register(seconds)
    Gauge("nv_embed_waiting", "Waiting", registry=registry).set(7)
    Gauge("vllm:num_requests_waiting", "Ray's names have no colon", registry=registry).set(7)
    mirror = Mirror(registry, recorder.instruments())
    good, bad = requests.labels("embeddings", "200"), requests.labels("embeddings", "500")
    good.inc(3)
    seconds.observe(0.05)
    mirror.copy()
    good.inc(2)
    seconds.observe(5)
    mirror.copy()
    mirror.copy()
    named: dict[str, Any] = {"route": "embeddings"}
    assert recorder.value("nv_embed_requests", **named, status="200") == 5
    assert recorder.value("nv_embed_requests", **named, status="500") is None
    bad.inc()
    mirror.copy()
    assert recorder.value("nv_embed_requests", **named, status="500") == 1
    assert recorder.value("nv_embed_waiting") == 7
    assert recorder.value("nv_embed_seconds_bucket", le="0.1") == 1
    assert recorder.value("nv_embed_seconds_bucket", le="+Inf") == 2
    assert recorder.value("nv_embed_seconds_count") == 2
    assert recorder.value("nv_embed_seconds_sum") == pytest.approx(5.05)
    assert len(recorder.made) == len(set(recorder.made))
    assert not [name for name in recorder.made if ":" in name]
