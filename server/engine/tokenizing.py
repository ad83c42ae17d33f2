"""Jobs into Encodings without holding up the event loop: short ones at once, others on threads.

Tells before it how many tokens a job will about have, for a full queue must not cost a tokenization
to say no; and how many are under way, for these must count. Knows no queue.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from model.batch import Encoding
from server.engine.inputs import InputTokenizer
from server.engine.interface import EmbedJob
from server.settings import MAX_REQUEST_TOKENS
from server.turns import Turns

_INLINE_CHARS = 1024
"""Up to this many characters and ids are tokenized on the event loop (about 1.6 ms at most)."""
_LONG_CHARS = 64 * 1024
"""More than this takes tens of milliseconds: others must not wait behind it."""
_FORGET = 0.01
"""Part of the tokens and characters seen that each request replaces: long ones weigh more."""
_MARGIN = 1.25
"""Of the expected tokens over the measured rate, so that few requests prove longer and are refused
when they have cost a tokenization."""


class Work(NamedTuple):
    """What a request brings: characters and ids, and the tokens they will about be."""

    chars: int
    ids: int
    tokens: int


class Tokenizing:
    """Around the tokenizer of one server. Every method runs on the event loop."""

    def __init__(self, tokenizer: InputTokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self._long_threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize-long")
        self._seen_tokens, self._seen_chars = 250.0, 1000.0
        self.under_way = 0
        """Tokens, about, of the jobs that are being tokenized."""

    def close(self) -> None:
        for threads in (self._threads, self._long_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    def expected_work(self, job: EmbedJob) -> Work:
        """How many tokens there will be, rather too many than too few."""
        chars = self._tokenizer.num_chars(job.inputs, job.options)
        ids = sum(len(item) for item in job.inputs if isinstance(item, list))
        expected = ids + math.ceil(_MARGIN * chars * self._seen_tokens / self._seen_chars)
        return Work(chars, ids, min(expected, MAX_REQUEST_TOKENS))

    def at_once(self, job: EmbedJob, work: Work) -> list[Encoding] | None:
        """None for a job that is for a thread. Raises InvalidRequestErrors naming the input."""
        if work.chars + work.ids > _INLINE_CHARS:
            return None
        encodings = self._tokenizer.tokenize(job.inputs, job.options)
        self._learn_tokens_per_char(work.chars, encodings)
        return encodings

    async def on_thread(self, job: EmbedJob, work: Work) -> list[Encoding]:
        """Raises InvalidRequestErrors naming the input; cancelling it ends the work soon."""
        self.under_way += work.tokens
        try:
            encodings = await self._on_thread(job, work)
        finally:
            self.under_way -= work.tokens
        self._learn_tokens_per_char(work.chars, encodings)
        return encodings

    async def _on_thread(self, job: EmbedJob, work: Work) -> list[Encoding]:
        abandoned, turns = threading.Event(), Turns()
        threads = self._long_threads if work.chars + work.ids > _LONG_CHARS else self._threads

        def is_abandoned() -> bool:
            turns.wait()
            return abandoned.is_set()

        call = partial(self._tokenizer.tokenize, job.inputs, job.options, abandoned=is_abandoned)
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, call)
        except asyncio.CancelledError:
            abandoned.set()
            raise

    def _learn_tokens_per_char(self, chars: int, encodings: Sequence[Encoding]) -> None:
        if chars:
            tokens = sum(len(encoding) for encoding in encodings)
            self._seen_tokens += tokens - _FORGET * self._seen_tokens
            self._seen_chars += chars - _FORGET * self._seen_chars
