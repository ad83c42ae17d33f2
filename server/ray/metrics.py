"""The server's metrics as Ray's, so that they stand beside those of the cluster.

Ray's exporter sets `ray_` before a name, and says of which replica it is. Knows no metric by name.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric

_PREFIX = "nv_embed"
PERIOD_S = 5.0


class Instruments(NamedTuple):
    """Ray's classes: the one's objects have `inc`, the other's `set`, both with `tags`."""

    counter: Any
    gauge: Any


class Mirror:
    """Copies a registry whenever it is told to.

    A histogram becomes the gauges NAME_bucket, NAME_sum and NAME_count: Ray's own takes single
    observations, and these are counted already. To Prometheus a bucket is a bucket.
    """

    def __init__(self, registry: CollectorRegistry, instruments: Instruments) -> None:
        self._registry, self._instruments = registry, instruments
        self._made: dict[str, Any] = {}
        self._seen: dict[tuple[str, ...], float] = {}

    def copy(self) -> None:
        for family in self._registry.collect():
            if family.name.startswith(_PREFIX):
                self._copy(family)

    def _copy(self, family: Metric) -> None:
        for sample in family.samples:
            labels = dict(sample.labels)
            if family.type != "counter":
                gauge = self._instrument(self._instruments.gauge, sample.name, family, labels)
                gauge.set(sample.value, tags=labels)
                continue
            counter = self._instrument(self._instruments.counter, family.name, family, labels)
            key = (family.name, *labels.values())
            more = sample.value - self._seen.get(key, 0.0)
            self._seen[key] = sample.value
            if more > 0:  # Ray's refuse a zero
                counter.inc(more, tags=labels)

    def _instrument(self, kind: Any, name: str, family: Metric, labels: dict[str, str]) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, family.documentation, tuple(labels))
        return self._made[name]

    async def keep(self) -> None:
        """Copy until it is cancelled."""
        while True:
            self.copy()
            await asyncio.sleep(PERIOD_S)
