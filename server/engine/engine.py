"""EmbeddingEngine: admit, tokenize, submit, await; start, ready, drain, stop.

What the HTTP edge sees of everything behind it. Knows no HTTP beyond the error tree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding, RunnerInfo, RunnerOptions, sequence_lengths
from model.families import Family
from model.fingerprint import fingerprint
from model.hub import ModelSource
from model.platform import resources
from model.tokenizer import NVEmbedTokenizer
from model.weights.headers import weight_files
from server.engine.averaging import averaged
from server.engine.batcher import Batcher
from server.engine.devices import child_environment, choose, worker_options
from server.engine.inputs import InputTokenizer
from server.engine.interface import EmbedJob, EmbedResult, EngineLimits
from server.engine.key_shares import KeyShares
from server.engine.loop_lag import LoopLag
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

_ENDING = "the server is shutting down"


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
        self._lag = LoopLag(self.metrics.loop_lag)
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
            min_ready=settings.min_ready_workers,
            most_failures=settings.exit_after_failed_starts,
        )
        self._min_ready = self._least_ready(settings)
        share = settings.max_key_share
        self._shares = KeyShares(int(share * settings.max_queued_tokens) if share < 1 else None)
        self._leaving = self._draining = False
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
            draining=lambda: self._leaving,
            cache_bytes=lambda: self._batcher.cache.used,
        )
        batches = [options.max_batch_tokens for options in self.worker_options]
        for name, text, value in (
            ("workers", "Engine workers that there should be", len(self.worker_options)),
            ("min_ready_workers", "Of --min-ready-workers", self._min_ready),
            ("max_queued_tokens", "Of --max-queued-tokens", self.max_queued_tokens),
            ("max_batch_tokens", "Tokens in a batch, at most", max(batches)),
            ("max_batch_inputs", "Of --max-batch-seqs", self.worker_options[0].max_batch_seqs),
            ("max_input_tokens", "Tokens of an input, at most", self.max_input_tokens),
        ):
            self.metrics.constant(f"nv_embed_{name}", text, value)
        self.metrics.show_workers([one.device for one in self.worker_options], self._build)

    def _build(self) -> Iterator[tuple[str, ...]]:
        """Of each worker, as nv_embed_build_info shows it; while none is ready, what is known."""
        what = (version("nv-embed-server"), self.source.model_id, self.source.revision or "")
        for one in self.runners:
            yield (*what, one.dtype, one.quantization, one.attention, one.device_name)
        if not self.runners:
            yield (*what, *("",) * 4)

    def _input_limit(self, settings: Settings) -> int:
        most, asked = self.config.most_input_tokens, settings.max_input_tokens
        if asked is not None and asked > most:
            raise SettingsError(
                f"--max-input-tokens {asked} is more than the model's {most}: lower it"
            )
        return asked or self.config.max_input_tokens

    def _least_ready(self, settings: Settings) -> int:
        workers, asked = len(self.worker_options), settings.min_ready_workers
        if asked > workers:
            raise SettingsError(
                f"--min-ready-workers {asked} is more than the {workers} that there are: lower it"
            )
        return asked

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
        self._lag.start()
        self._supervisor.start()

    async def failed(self) -> None:
        """Wait for a failure to start that no new try would mend; raises its StartError."""
        await self._supervisor.failed()

    @property
    def not_ready(self) -> str | None:
        """Why no more requests should be sent here; None when they are welcome."""
        if self._leaving:
            return _ENDING
        ready = len(self._batcher.workers)
        if 0 < ready < self._min_ready:
            return f"{ready} of {self._min_ready} workers are ready: {self._trouble()}"
        return self._refusing

    @property
    def _refusing(self) -> str | None:
        """Why requests that come nevertheless are refused; None when they are served."""
        if self._draining:
            return _ENDING
        if not self._batcher.workers:
            return self._trouble()
        if self._batcher.is_stuck():
            return "no worker has answered lately"
        return None

    def _trouble(self) -> str:
        return "; ".join(sorted(set(self._supervisor.trouble.values()))) or "no worker is ready"

    @property
    def draining(self) -> bool:
        return self._leaving

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and not answered yet."""
        return self._in_flight

    def leave(self) -> None:
        """Send no more requests here, says `not_ready` from now on; those that come are served."""
        self._leaving = True

    async def drain(self, timeout: float) -> bool:  # noqa: ASYNC109
        """Refuse new requests and wait for the accepted ones; False if some were left."""
        self._leaving = self._draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("drain timed out with %d requests unanswered", self._in_flight)
            self._batcher.fail_all(UnavailableError(_ENDING, retry_after=1))
            return False
        return True

    async def stop(self) -> None:
        """End the workers; what is unanswered fails."""
        self._leaving = self._draining = True
        self._batcher.fail_all(UnavailableError(_ENDING, retry_after=1))
        self._lag.stop()
        await self._supervisor.stop()
        self._tokenizing.close()

    @property
    def runners(self) -> list[RunnerInfo]:
        """What the ready workers run on."""
        return [worker.info for worker in self._batcher.workers]

    # Requests

    async def embed(self, job: EmbedJob, key_name: str = "") -> EmbedResult:
        """Raises ServerErrors; cancelling it frees the queue."""
        self._refuse_if_not_ready()
        work = self._admit(job, key_name)
        with _Accepted(self, key_name, work.tokens):
            began = time.monotonic()
            encodings = self._tokenizing.at_once(job, work)
            if encodings is None:
                encodings = await self._tokenizing.on_thread(job, work)
                self._refuse_if_not_ready()  # any more
            tokenized = time.monotonic()
            tokens = self._count_tokens(encodings, len(job.inputs), tokenized - began)
            if tokens > work.tokens:
                self._refuse_if_full(tokens)
            rows, begun = await self._run(encodings, job, key_name)
            vectors = averaged(encodings, rows)
            cut = [encoding.input(i) for i, encoding in enumerate(encodings) if encoding.is_cut]
            self.metrics.count_inputs(job, len(cut))
            if key_name:
                self.metrics.key_tokens.add(key_name, tokens)
            spans = [encoding.span for encoding in encodings if encoding.span is not None]
            begun = begun or tokenized  # all was known already
            stages = (tokenized - began, begun - tokenized, time.monotonic() - begun)
            return EmbedResult(vectors, tokens, cut, spans, stages)

    def _count_tokens(self, encodings: list[Encoding], inputs: int, seconds: float) -> int:
        """All of a request's, which took so long to find."""
        self.metrics.tokenize_seconds.observe(seconds)
        self.metrics.request_inputs.observe(inputs)
        lengths = sequence_lengths(encodings)
        for length in lengths:
            self.metrics.input_tokens.observe(length)
        return sum(lengths)

    async def tokenize(self, job: EmbedJob) -> list[Encoding]:
        """Inputs to Encodings, each checked; a refusal names the input: input[17].

        It needs no worker; else it is admitted, counted and cancelled as `embed` is.
        """
        if self._draining:
            self._refuse_if_not_ready()
        work = self._admit(job)
        with _Accepted(self, "", 0):
            encodings = self._tokenizing.at_once(job, work)
            if encodings is None:
                encodings = await self._tokenizing.on_thread(job, work)
            return encodings

    def _accept(self, key_name: str, tokens: int) -> None:
        self._in_flight += 1
        self._idle.clear()
        self._shares.take(key_name, tokens)

    def _let_go(self, key_name: str, tokens: int) -> None:
        self._shares.give_back(key_name, tokens)
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()

    def _admit(self, job: EmbedJob, key_name: str = "") -> Work:
        """Raises OverloadedError when there is no room for the tokens that are expected."""
        work = self._tokenizing.expected_work(job)
        self._refuse_if_full(work.tokens)
        if not self._shares.has_room(key_name, work.tokens):
            self.metrics.count_refused("key_share")
            raise OverloadedError(
                "your key's share of the queue is full (--max-key-share)",
                retry_after=self._batcher.seconds_of_work(),
            )
        return work

    async def _run(
        self, encodings: list[Encoding], job: EmbedJob, key_name: str
    ) -> tuple[list[NDArray[np.float32]], float]:
        """-> (rows, when the first input went to a worker; 0: none did)."""
        deadline = job.deadline
        request = self._batcher.submit(
            encodings,
            deadline=deadline,
            priority=job.priority,
            salt=job.salt,
            key_name=key_name,
        )
        timer = None
        if deadline != float("inf"):
            delay = max(0.0, deadline - time.monotonic())
            timer = asyncio.get_running_loop().call_later(delay, self._batcher.expire, request)
        try:
            return await request.answer.future, request.begun
        except asyncio.CancelledError:
            self._batcher.drop(request)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _refuse_if_not_ready(self) -> None:
        if reason := self._refusing:
            self.metrics.count_refused("draining" if self._draining else "not_ready")
            raise UnavailableError(f"not ready: {reason}", retry_after=2)

    def _refuse_if_full(self, tokens: int) -> None:
        waiting = self._batcher.queue.num_tokens + self._tokenizing.under_way
        if waiting and waiting + tokens > self.max_queued_tokens:
            self.metrics.rejected.inc()
            self.metrics.count_refused("queue")
            raise OverloadedError(
                f"the queue is full: {waiting} tokens wait, the limit is {self.max_queued_tokens}",
                retry_after=self._batcher.seconds_of_work(),
            )


class _Accepted:
    """What a drain waits for, and what counts against its key's share, while the block runs."""

    __slots__ = ("_engine", "_key_name", "_tokens")

    def __init__(self, engine: EmbeddingEngine, key_name: str, tokens: int) -> None:
        self._engine, self._key_name, self._tokens = engine, key_name, tokens

    def __enter__(self) -> None:
        self._engine._accept(self._key_name, self._tokens)

    def __exit__(self, *_: object) -> None:
        self._engine._let_go(self._key_name, self._tokens)
