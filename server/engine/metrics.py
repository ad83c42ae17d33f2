"""Prometheus metric objects and their buckets, nothing else. Units stand in the names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    PlatformCollector,
    ProcessCollector,
)

from model.families import Side
from server.engine.interface import EmbedJob
from server.engine.tallies import Count, Counts, Tally
from server.engine.worker_tallies import BuildCollector, WorkerCollector, WorkerTally

_LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_LAGS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_PARTS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_INPUTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SIDES: tuple[Side | None, ...] = ("query", "passage", None)
Refusal = Literal["queue", "key_share", "bytes", "connections", "not_ready", "draining"]
_REFUSALS: tuple[Refusal, ...] = (
    *("queue", "key_share", "bytes", "connections", "not_ready", "draining"),
)
Death = Literal["crash", "hang", "device", "nonsense"]
_DEATHS: tuple[Death, ...] = ("crash", "hang", "device", "nonsense")
"""It ended, or was killed; it gave no answer; it lost its device; it said what cannot be."""
ROUTES = (
    *("embeddings", "rerank", "tokenize", "models", "instructions"),
    *("info", "health", "metrics", "other"),
)
STATUSES = (200, 400, 401, 404, 405, 408, 409, 413, 415, 429, 431, 499, 500, 503, 504)


class Metrics:
    """All metrics of one server, in a registry of their own, all present at zero."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        PlatformCollector(self.registry)
        ProcessCollector(registry=self.registry)
        self.requests = Counts("nv_embed_requests", "HTTP requests answered", ("route", "status"))
        self.registry.register(self.requests)
        for status in STATUSES:
            self.requests.labels("embeddings", str(status))
        self.request_seconds = self._histogram(
            "nv_embed_request_duration_seconds",
            "From the first byte of an embeddings request to its answer, of those that got vectors",
            _LATENCY,
        )
        self.tokenize_seconds = self._histogram(
            "nv_embed_tokenize_duration_seconds", "From admission to a request's token ids", _PARTS
        )
        self.serialize_seconds = self._histogram(
            "nv_embed_serialize_duration_seconds", "Writing a request's answer as JSON", _PARTS
        )
        self.request_inputs = self._histogram(
            "nv_embed_request_inputs", "Inputs of an embeddings request", _INPUTS
        )
        self.input_tokens = self._histogram("nv_embed_input_tokens", "Tokens of an input", _TOKENS)
        self.loop_lag = self._histogram(
            "nv_embed_event_loop_lag_seconds",
            "How late the event loop is, looked at four times a second",
            _LAGS,
        )
        self.inputs = self._counter("nv_embed_inputs", "Inputs embedded")
        self.tokens = self._counter("nv_embed_tokens", "Tokens embedded")
        sides = self._counts(
            "nv_embed_answered_inputs", "Inputs answered, by the side asked for", "input_type"
        )
        self._of_side = {side: sides.labels(side or "none") for side in _SIDES}
        self._truncated = self._counter(
            "nv_embed_truncated_inputs", "Inputs answered of which only a part was embedded"
        )
        self.queue_seconds = self._histogram(
            "nv_embed_queue_wait_seconds",
            "From admission to the batch that takes an input",
            _LATENCY,
        )
        self.batch_seconds = self._histogram(
            "nv_embed_batch_duration_seconds",
            "From when its worker had nothing else to do to a batch's rows",
            _LATENCY,
        )
        self.batch_tokens = self._histogram("nv_embed_batch_tokens", "Tokens in a batch", _TOKENS)
        self.batch_inputs = self._histogram("nv_embed_batch_inputs", "Inputs in a batch", _SEQS)
        self.cancelled = self._counter(
            "nv_embed_cancelled_requests", "Requests whose client went away"
        )
        self.expired = self._counter(
            "nv_embed_expired_requests", "Requests whose deadline passed while they waited"
        )
        self._refused = self._counts(
            "nv_embed_refused_requests", "Requests refused for want of room", "reason", _REFUSALS
        )
        self.rejected = self._counter(
            "nv_embed_rejected_requests", "Requests refused because the queue was full"
        )
        self.shared_inputs = self._counter(
            "nv_embed_shared_inputs", "Inputs that got the vector of an equal one in flight"
        )
        self.cache_hits = self._counter(
            "nv_embed_cache_hits", "Inputs whose vector was in the cache (--cache-bytes)"
        )
        self.cache_misses = self._counter(
            "nv_embed_cache_misses", "Inputs that were looked up in the cache in vain"
        )
        self._deaths = self._counts(
            "nv_embed_worker_deaths",
            "Engine workers that died while they served, and were replaced",
            "cause",
            _DEATHS,
        )
        self.failed_starts = self._counter(
            "nv_embed_worker_failed_starts", "Engine workers that ended before they were ready"
        )
        self.memory_splits = self._counter(
            "nv_embed_out_of_memory_splits", "Batches, or parts, halved for want of memory"
        )
        self.non_finite = self._counter(
            "nv_embed_non_finite_vectors", "Inputs whose vector was not finite"
        )
        self.quarantined = self._counter(
            "nv_embed_quarantined_inputs", "Inputs found to kill workers, refused for a while"
        )
        self.key_tokens = self._counts(
            "nv_embed_key_tokens", "Tokens of answered requests, by the name of their key", "key"
        )
        self.workers: list[WorkerTally] = []
        """By slot."""

    def count_inputs(self, job: EmbedJob, truncated: int) -> None:
        """Those of an answered request."""
        self._of_side[job.options.side].inc(len(job.inputs) - job.prompted)
        if job.prompted:
            self._of_side["query"].inc(job.prompted)
        if truncated:
            self._truncated.inc(truncated)

    def count_refusal(self, status: int) -> None:
        """A request that was refused before it had a route."""
        self.requests.labels("other", str(status)).inc()
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self._refused.add("connections")

    def count_refused(self, reason: Refusal) -> None:
        self._refused.add(reason)

    def count_death(self, cause: Death) -> None:
        self._deaths.add(cause)

    def name_keys(self, names: Iterable[str]) -> None:
        """Whose tokens are counted."""
        for name in sorted(names):
            self.key_tokens.labels(name)

    def show_workers(
        self, devices: Sequence[str], build: Callable[[], Iterable[tuple[str, ...]]]
    ) -> None:
        """One worker on each device; build: see BuildCollector."""
        self.workers += [WorkerTally(slot, device) for slot, device in enumerate(devices)]
        self.registry.register(WorkerCollector(self.workers))
        self.registry.register(BuildCollector(build))

    def watch(
        self,
        *,
        waiting_requests: Callable[[], float],
        running_requests: Callable[[], float],
        queued_inputs: Callable[[], float],
        queued_tokens: Callable[[], float],
        workers_ready: Callable[[], float],
        draining: Callable[[], float],
        cache_bytes: Callable[[], float],
    ) -> None:
        """Gauges that are read when they are scraped."""
        for name, text, read in (
            ("nv_embed_waiting_requests", "Requests with inputs in the queue", waiting_requests),
            ("nv_embed_running_requests", "Requests being worked on", running_requests),
            ("nv_embed_queued_inputs", "Inputs waiting for a batch", queued_inputs),
            ("nv_embed_queued_tokens", "Tokens waiting for a batch", queued_tokens),
            ("nv_embed_workers_ready", "Engine workers that are ready", workers_ready),
            ("nv_embed_draining", "1 once the server is about to end", draining),
            (
                "nv_embed_event_loop_tasks",
                "Tasks of the event loop; one that only grows is a leak",
                lambda: len(asyncio.all_tasks()),
            ),
            ("nv_embed_cache_bytes", "Bytes of vectors held by the cache", cache_bytes),
            # The names that existing autoscaling recipes watch.
            ("vllm:num_requests_waiting", "As nv_embed_waiting_requests", waiting_requests),
            ("vllm:num_requests_running", "As nv_embed_running_requests", running_requests),
        ):
            self.gauge(name, text, read)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """One more gauge that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def constant(self, name: str, text: str, value: float) -> None:
        """A limit, so that no alert need know it."""
        Gauge(name, text, registry=self.registry).set(value)

    def _counter(self, name: str, text: str) -> Count:
        counts = Counts(name, text)
        self.registry.register(counts)
        return counts.labels()

    def _counts(self, name: str, text: str, label: str, values: Iterable[str] = ()) -> Counts:
        counts = Counts(name, text, (label,))
        for value in values:
            counts.labels(value)
        self.registry.register(counts)
        return counts

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Tally:
        tally = Tally(name, text, bounds)
        self.registry.register(tally)
        return tally
