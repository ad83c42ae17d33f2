"""EmbeddingEngine: admit, tokenize, submit, await; start, ready, drain, stop.

What the HTTP edge sees of everything behind it. Knows no HTTP beyond the error tree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding, RunnerInfo, RunnerOptions
from model.families import Family
from model.fingerprint import fingerprint
from model.hub import ModelSource
from model.platform import resources
from model.tokenizer import NVEmbedTokenizer
from model.weights.headers import weight_files
from server.engine.batcher import Batcher
from server.engine.devices import child_environment, choose, worker_options
from server.engine.inputs import InputTokenizer
from server.engine.interface import EmbedJob, EmbedResult, EngineLimits
from server.engine.metrics import Metrics
from server.engine.supervisor import Supervisor, load_timeout_of
from server.engine.tokenizing import Tokenizing, Work
from server.errors import (
    OverloadedError,
    SettingsError,
    UnavailableError,
)
from server.settings import Settings

logger = logging.getLogger("nv_embed.engine")


class EmbeddingEngine:
    """See the module. Create it, `start()`, then `embed()` from any number of tasks."""

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        """Reads config and tokenizer. Raises SettingsError or CheckpointError."""
        resources.return_freed_memory()
        self.source = source
        # First: what changes on disk from here on is another checkpoint, to the workers as well.
        self.fingerprint = fingerprint(source.path)
        self.config = source.config()
        tokenizer = NVEmbedTokenizer.from_dir(source.path, self.config.family.name)
        self.metrics = Metrics()
        self.max_input_tokens = self._input_limit(settings)
        self.max_queued_tokens = settings.max_queued_tokens
        self._tokenizing = Tokenizing(
            InputTokenizer(tokenizer, self.max_input_tokens, settings.truncate)
        )
        self._batcher = Batcher(
            self.metrics, hang_timeout=settings.hang_timeout, cache_bytes=settings.cache_bytes
        )
        self.worker_options = worker_options(
            self._runner_options(settings),
            choose(settings.devices, child_environment()),
            resources.usable_cores(),
            settings.max_batch_tokens,
        )
        self._supervisor = Supervisor(
            self.worker_options,
            self._batcher,
            runner=settings.runner,
            log_format=settings.log_format,
            log_level=settings.log_level,
            width=self.config.hidden_size,
            load_timeout=load_timeout_of(sum(file.size for file in weight_files(source.path))),
        )
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._show_gauges()

    def _runner_options(self, settings: Settings) -> RunnerOptions:
        """What all workers are told; each has its own device, threads and batch size."""
        return RunnerOptions(
            path=str(self.source.path),
            family=self.config.family.name,
            fingerprint=self.fingerprint,
            dtype=settings.dtype,
            quantization=settings.quantization,
            attention=settings.attention,
            cuda_graphs=settings.cuda_graphs,
            cpu_products=settings.cpu_products,
            fused_kernels=settings.fused_kernels,
            threads=settings.threads,
            max_batch_seqs=settings.max_batch_seqs,
            max_input_tokens=self.max_input_tokens,
        )

    def _show_gauges(self) -> None:
        queue = self._batcher.queue
        self.metrics.watch(
            waiting_requests=lambda: queue.num_requests,
            running_requests=lambda: self._batcher.running_requests,
            queued_inputs=lambda: queue.num_entries,
            queued_tokens=lambda: queue.num_tokens,
            workers_ready=lambda: len(self._batcher.workers),
            cache_bytes=lambda: self._batcher.cache.used,
        )

    def _input_limit(self, settings: Settings) -> int:
        most, asked = self.config.most_input_tokens, settings.max_input_tokens
        if asked is not None and asked > most:
            raise SettingsError(
                f"--max-input-tokens {asked} is more than the model's {most}: lower it"
            )
        return asked or self.config.max_input_tokens

    @property
    def family(self) -> Family:
        return self.config.family

    @property
    def prompts(self) -> Mapping[str, str]:
        return self.config.prompts

    @property
    def dimensions(self) -> int:
        """D, the numbers of a vector."""
        return self.config.hidden_size

    @property
    def matryoshka_dimensions(self) -> tuple[int, ...]:
        return self.config.matryoshka_dimensions

    @property
    def limits(self) -> EngineLimits:
        return EngineLimits(
            self.max_input_tokens,
            self.max_queued_tokens,
            tuple(options.max_batch_tokens for options in self.worker_options),
        )

    # Life

    def start(self) -> None:
        """Start the workers; `not_ready` tells when they can serve."""
        if self.source.notice:
            logger.warning(self.source.notice)
        self._supervisor.start()

    async def failed(self) -> None:
        """Wait for a failure to start that no new try would mend; raises its StartError."""
        await self._supervisor.failed()

    @property
    def not_ready(self) -> str | None:
        """Why requests would be refused now; None when they are served."""
        if self._draining:
            return "the server is shutting down"
        if not self._batcher.workers:
            reasons = sorted(set(self._supervisor.trouble.values())) or ["no worker is ready"]
            return "; ".join(reasons)
        if self._batcher.is_stuck():
            return "no worker has answered lately"
        return None

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and not answered yet."""
        return self._in_flight

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Refuse new requests and wait for the accepted ones; False if some were left."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("drain timed out with %d requests unanswered", self._in_flight)
            self._batcher.fail_all(UnavailableError("the server is shutting down", retry_after=1))
            return False
        return True

    async def stop(self) -> None:
        """End the workers; what is unanswered fails."""
        self._draining = True
        self._batcher.fail_all(UnavailableError("the server is shutting down", retry_after=1))
        await self._supervisor.stop()
        self._tokenizing.close()

    @property
    def runners(self) -> list[RunnerInfo]:
        """What the ready workers run on."""
        return [worker.info for worker in self._batcher.workers]

    # Requests

    async def embed(self, job: EmbedJob) -> EmbedResult:
        """Raises ServerErrors; cancelling it frees the queue."""
        self._refuse_if_not_ready()
        work = self._admit(job)
        with self._accepted():
            encodings = await self._tokenizing.tokenize(job, work)
            tokens = sum(len(encoding) for encoding in encodings)
            self._refuse_if_not_ready()
            if tokens > work.tokens:
                self._refuse_if_full(tokens)
            vectors = await self._run(encodings, job.deadline)
            cut = [index for index, encoding in enumerate(encodings) if encoding.is_cut]
            self.metrics.count_inputs(job, len(cut))
            return EmbedResult(vectors, tokens, cut)

    async def tokenize(self, job: EmbedJob) -> list[Encoding]:
        """Inputs to Encodings, each checked; a refusal names the input: input[17].

        It needs no worker; else it is admitted, counted and cancelled as `embed` is.
        """
        if self._draining:
            self._refuse_if_not_ready()
        work = self._admit(job)
        with self._accepted():
            return await self._tokenizing.tokenize(job, work)

    @contextmanager
    def _accepted(self) -> Iterator[None]:
        """What a drain waits for."""
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    def _admit(self, job: EmbedJob) -> Work:
        """Raises OverloadedError when there is no room for the tokens that are expected."""
        work = self._tokenizing.expected_work(job)
        self._refuse_if_full(work.tokens)
        return work

    async def _run(self, encodings: list[Encoding], deadline: float) -> list[NDArray[np.float32]]:
        request = self._batcher.submit(encodings, deadline=deadline)
        timer = None
        if deadline != float("inf"):
            delay = max(0.0, deadline - time.monotonic())
            timer = asyncio.get_running_loop().call_later(delay, self._batcher.expire, request)
        try:
            return await request.answer.future
        except asyncio.CancelledError:
            self._batcher.drop(request)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _refuse_if_not_ready(self) -> None:
        if reason := self.not_ready:
            raise UnavailableError(f"not ready: {reason}", retry_after=2)

    def _refuse_if_full(self, tokens: int) -> None:
        waiting = self._batcher.queue.num_tokens + self._tokenizing.under_way
        if waiting and waiting + tokens > self.max_queued_tokens:
            self.metrics.rejected.inc()
            raise OverloadedError(
                f"the queue is full: {waiting} tokens wait, the limit is {self.max_queued_tokens}",
                retry_after=self._batcher.seconds_of_work(),
            )
