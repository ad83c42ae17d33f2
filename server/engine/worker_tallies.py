"""What Prometheus reads of each worker, and of what runs on them. Knows no queue and no batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_PAGE = os.sysconf("SC_PAGE_SIZE")
_LABELS = ("worker", "device")
BUILD = ("version", "model", "revision", "dtype", "quantization", "attention", "device")
"""Labels of nv_embed_build_info."""


class WorkerTally:
    """One worker's place, whatever process holds it."""

    def __init__(self, slot: int, device: str) -> None:
        self.labels = (f"{slot}", device)
        self.busy_seconds, self.batches = 0.0, 0
        self.start_seconds = 0.0
        self.device_bytes = 0
        self.pid: int | None = None

    @property
    def memory_bytes(self) -> int:
        """Of its process, as it is now; 0 while there is none."""
        if self.pid is not None:
            with contextlib.suppress(OSError, ValueError, IndexError):
                return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE
        return 0


class WorkerCollector(Collector):
    """All workers of a server."""

    def __init__(self, workers: Sequence[WorkerTally]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        busy = CounterMetricFamily(
            "nv_embed_worker_busy_seconds", "Seconds in which it had a batch", labels=_LABELS
        )
        batches = CounterMetricFamily(
            "nv_embed_worker_batches", "Batches that it has computed", labels=_LABELS
        )
        start = GaugeMetricFamily(
            "nv_embed_worker_start_seconds",
            "How long it took to become ready, the last time; 0 before",
            labels=_LABELS,
        )
        memory = GaugeMetricFamily(
            "nv_embed_worker_memory_bytes", "Resident memory of its process", labels=_LABELS
        )
        device = GaugeMetricFamily(
            "nv_embed_worker_device_memory_bytes",
            "Memory of its GPU that its process has reserved; 0 on a CPU",
            labels=_LABELS,
        )
        for worker in self._workers:
            busy.add_metric(worker.labels, worker.busy_seconds)
            batches.add_metric(worker.labels, worker.batches)
            start.add_metric(worker.labels, worker.start_seconds)
            memory.add_metric(worker.labels, worker.memory_bytes)
            device.add_metric(worker.labels, worker.device_bytes)
        return (busy, batches, start, memory, device)

    describe = collect  # by which the registry knows their names


class BuildCollector(Collector):
    """What runs here, in labels: one series for each kind of worker."""

    def __init__(self, read: Callable[[], Iterable[tuple[str, ...]]]) -> None:
        """read: values of BUILD."""
        self._read = read

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily("nv_embed_build_info", "What runs here; always 1", labels=BUILD)
        for values in sorted(set(self._read())):
            family.add_metric(values, 1)
        yield family

    describe = collect
