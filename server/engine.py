"""EmbeddingEngine: admit, tokenize, submit, await; start, ready, drain, stop.

What the HTTP edge sees of everything behind it. Knows no HTTP beyond the error tree.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from model import host
from model.batch import Encoding, RunnerInfo, RunnerOptions
from model.config import NVEmbedConfig
from model.errors import EmptyPoolError, InputTooLongError, ModelError
from model.hub import NVIDIA_NOTICE, ModelSource, weight_files
from model.tokenizer import (
    BOS_ID,
    EOS_ID,
    MAX_PIECE_CHARS,
    NVEmbedTokenizer,
    Truncation,
    to_encoding,
)
from server.batcher import Batcher
from server.errors import (
    ContextLengthExceededError,
    InvalidRequestError,
    OverloadedError,
    SettingsError,
    UnavailableError,
)
from server.metrics import Metrics
from server.settings import MAX_REQUEST_TOKENS, Settings
from server.supervisor import Supervisor, worker_options

logger = logging.getLogger("nv_embed.engine")

Input = str | list[int]
"""A text, or token ids that are used verbatim."""

_INLINE_CHARS = 1024
"""Texts up to this many characters are tokenized on the event loop (about 1.6 ms at most)."""


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How inputs become Encodings."""

    prefix: str | None = None  # verbatim instruction; None and "" put nothing in front
    truncate: Truncation | None = None  # None: the server's default
    max_tokens: int | None = None  # a request's own, lower limit


class EmbeddingEngine:
    """See the module. Create it, `start()`, then `embed()` from any number of tasks."""

    def __init__(self, settings: Settings, source: ModelSource) -> None:
        """Reads config and tokenizer. Raises SettingsError or CheckpointError."""
        self.source = source
        self.config = NVEmbedConfig.from_dir(source.path)
        self.tokenizer = NVEmbedTokenizer.from_dir(source.path)
        weight_files(source.path)  # their absence is better told now than by a worker
        self.metrics = Metrics()
        self.max_input_tokens = self._input_limit(settings)
        self.max_queued_tokens = settings.max_queued_tokens
        self._truncate = settings.truncate
        self._batcher = Batcher(self.metrics)
        base = RunnerOptions(
            path=str(source.path),
            dtype=settings.dtype,
            quantization=settings.quantization,
            attention=settings.attention,
            threads=settings.threads,
            max_batch_seqs=settings.max_batch_seqs,
            max_input_tokens=self.max_input_tokens,
        )
        self.worker_options = worker_options(
            base, settings.devices, host.usable_cores(), settings.max_batch_tokens
        )
        self._supervisor = Supervisor(
            self.worker_options,
            self._batcher,
            runner=settings.runner,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        queue = self._batcher.queue
        self.metrics.watch(
            waiting_requests=lambda: queue.num_requests,
            running_requests=lambda: self._batcher.running_requests,
            queued_inputs=lambda: queue.num_entries,
            queued_tokens=lambda: queue.num_tokens,
            workers_ready=lambda: len(self._batcher.workers),
        )

    def _input_limit(self, settings: Settings) -> int:
        limit, asked = self.config.max_input_tokens, settings.max_input_tokens
        if asked is not None and asked > limit:
            raise SettingsError(
                f"--max-input-tokens {asked} is more than the model's {limit}: lower it"
            )
        return asked or limit

    # Life

    def start(self) -> None:
        """Start the workers; `not_ready` tells when they can serve."""
        if self.source.is_nvidia:
            logger.warning(NVIDIA_NOTICE)
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
        return None

    @property
    def draining(self) -> bool:
        return self._draining

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
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def runners(self) -> list[RunnerInfo]:
        """What the ready workers run on."""
        return [worker.info for worker in self._batcher.workers]

    @property
    def worker_pids(self) -> dict[int, int]:
        return self._supervisor.pids

    # Requests

    async def embed(
        self,
        inputs: Sequence[Input],
        how: Tokenization,
        *,
        deadline: float = float("inf"),
    ) -> tuple[list[NDArray[np.float32]], int]:
        """-> (one float32 [D] per input, the number of ids that ran).

        deadline: on time.monotonic's clock. Raises ServerErrors; cancelling it frees the queue.
        """
        self._refuse_if_not_ready()
        self._refuse_if_full(0)
        self._in_flight += 1
        self._idle.clear()
        try:
            encodings = await self.tokenize(inputs, how)
            tokens = sum(len(encoding) for encoding in encodings)
            self._refuse_if_not_ready()
            self._refuse_if_full(tokens)
            return await self._run(encodings, deadline), tokens
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _run(self, encodings: list[Encoding], deadline: float) -> list[NDArray[np.float32]]:
        request = self._batcher.submit(encodings, deadline=deadline)
        timer = None
        if deadline != float("inf"):
            delay = max(0.0, deadline - time.monotonic())
            timer = asyncio.get_running_loop().call_later(delay, self._batcher.expire, request)
        try:
            return await request.waiter.future
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
        waiting = self._batcher.queue.num_tokens
        if waiting and waiting + max(tokens, 1) > self.max_queued_tokens:
            self.metrics.rejected.inc()
            raise OverloadedError(
                f"the queue is full: {waiting} tokens wait, the limit is {self.max_queued_tokens}",
                retry_after=self._batcher.seconds_of_work(),
            )

    async def tokenize(self, inputs: Sequence[Input], how: Tokenization) -> list[Encoding]:
        """Inputs to Encodings, each checked; a refusal names the input: input[17]."""
        truncate = self._truncate if how.truncate is None else how.truncate
        max_tokens = min(how.max_tokens or self.max_input_tokens, self.max_input_tokens)
        prefix = how.prefix or ""
        texts = [text for text in inputs if isinstance(text, str)]
        self._refuse_if_hopeless(texts, prefix, max_tokens)
        work = partial(
            self.tokenizer.encode_batch,
            texts,
            prefix,
            max_tokens=max_tokens,
            truncate=truncate,
        )
        if len(prefix) * len(texts) + sum(map(len, texts)) <= _INLINE_CHARS:
            results = work()
        else:
            results = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        if prefix and len(texts) < len(inputs):
            raise InvalidRequestError(
                'an instruction cannot be put before token ids: send text, or prompt: ""',
                param="input",
            )
        encoded = iter(results)
        encodings = []
        for index, item in enumerate(inputs):
            if isinstance(item, str):
                encodings.append(self._checked(next(encoded), index, len(inputs)))
            else:
                encodings.append(
                    self._from_ids(item, _param(index, len(inputs)), max_tokens, truncate)
                )
        total = sum(len(encoding) for encoding in encodings)
        if total > MAX_REQUEST_TOKENS:
            raise _too_many_tokens(f"{total}")
        return encodings

    @staticmethod
    def _refuse_if_hopeless(texts: Sequence[str], prefix: str, max_tokens: int) -> None:
        """Before tokenizing: nothing has fewer tokens than a sixteenth of its characters."""
        if len(prefix) > MAX_PIECE_CHARS * max_tokens:
            raise ContextLengthExceededError(
                f"the instruction alone has more than {max_tokens} tokens, the limit of one input",
                param="prompt",
            )
        least = (min((len(prefix) + len(text)) // MAX_PIECE_CHARS, max_tokens) for text in texts)
        if sum(least) > MAX_REQUEST_TOKENS:
            raise _too_many_tokens(f"more than {MAX_REQUEST_TOKENS}")

    @staticmethod
    def _checked(result: Encoding | ModelError, index: int, count: int) -> Encoding:
        if isinstance(result, InputTooLongError):
            raise _too_long(result.num_tokens, result.max_tokens, _param(index, count))
        if isinstance(result, EmptyPoolError):
            raise InvalidRequestError(f"{result}", param=_param(index, count))
        assert isinstance(result, Encoding), result
        return result

    def _from_ids(
        self, ids: list[int], param: str, max_tokens: int, truncate: Truncation
    ) -> Encoding:
        """Check ids and use them verbatim. Foreign ids (tiktoken's) mean other words here."""
        vocabulary = self.tokenizer.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InvalidRequestError(
                f"token ids must lie between 0 and {vocabulary - 1}. {_FOREIGN_IDS}", param=param
            )
        whole = len(ids) == self.max_input_tokens or ids[-1] == EOS_ID
        if len(ids) < 2 or ids[0] != BOS_ID or BOS_ID in ids[1:] or not whole:
            raise InvalidRequestError(
                f"token ids must start with BOS ({BOS_ID}), hold no other BOS, and end with EOS "
                f"({EOS_ID}). {_FOREIGN_IDS}",
                param=param,
            )
        try:
            return to_encoding(ids, 0, max_tokens, truncate)
        except InputTooLongError as error:
            raise _too_long(error.num_tokens, error.max_tokens, param) from None


_FOREIGN_IDS = (
    "These look like ids of another tokenizer: send text instead (LangChain's OpenAIEmbeddings: "
    "check_embedding_ctx_length=False), or ids from POST /tokenize"
)


def _param(index: int, count: int) -> str:
    return "input" if count == 1 else f"input[{index}]"


def _too_long(num_tokens: int | None, max_tokens: int, param: str) -> ContextLengthExceededError:
    shown = f"more than {max_tokens}" if num_tokens is None else f"{num_tokens}"
    return ContextLengthExceededError(
        f"This model's maximum context length is {max_tokens} tokens, however you requested "
        f'{shown} tokens ({param}). Shorten the input or send truncate: "END".',
        param=param,
    )


def _too_many_tokens(shown: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the inputs have {shown} tokens together, the limit of one request is "
        f"{MAX_REQUEST_TOKENS}: send fewer inputs at once",
        param="input",
    )
