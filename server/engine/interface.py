"""The seam between the dialects and the engine: what is asked for, what comes back, and by whom.

Whoever speaks HTTP sees an Engine and these values, and nothing behind them; the engine sees
neither wire types nor envelopes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding, RunnerInfo, Span
from model.chunks import Chunks
from model.families import Family, Side
from model.hub import ModelSource
from model.prompts import NO_PROMPT, Prompt
from model.tokenizer import Truncation


@dataclass(frozen=True, slots=True)
class PromptedText:
    """A text that came with its prompt written before it."""

    prompt: Prompt
    text: str


Input = str | PromptedText | list[int]
"""A text, or token ids that are used verbatim."""


class EncodingOptions(NamedTuple):
    """How inputs become Encodings."""

    prompt: Prompt = NO_PROMPT  # what stands around each text
    truncate: Truncation | None = None  # None: the server's default
    max_tokens: int | None = None  # a request's own, lower limit
    averages: bool = False  # a too long text is split, and its parts' vectors averaged
    chunks: Chunks | None = None  # of the one input: a vector for each
    is_default: bool = False  # whether nobody asked for `prompt`: token ids go without it
    side: Side | None = None  # which was asked for


class EmbedJob(NamedTuple):
    """One request, whatever its dialect."""

    inputs: Sequence[Input]
    options: EncodingOptions = EncodingOptions()
    deadline: float = float("inf")
    """On time.monotonic's clock."""
    prompted: int = 0
    """How many of the inputs are PromptedTexts."""
    priority: int = 0
    """Of what waits, the lower comes sooner."""
    salt: bytes = b""
    """Vectors in the cache and in flight are shared with jobs of the same salt alone."""


class EmbedResult(NamedTuple):
    """The answer to an EmbedJob."""

    vectors: Sequence[NDArray[np.float32]]
    """One [D] for each input or chunk, of length one."""
    tokens: int
    """Ids that ran: BOS, EOS and prefix counted, after truncation."""
    cut: Sequence[int] = ()
    """Which inputs were truncated."""
    spans: Sequence[Span] = ()
    """Where there are chunks: of each vector."""
    stages: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Seconds for its tokens, for its turn, and from then to its last vector."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What is refused, and how work is cut into batches; in tokens."""

    max_input_tokens: int
    max_queued_tokens: int
    max_batch_tokens: tuple[int, ...]
    """One of each worker."""


class Engine(Protocol):
    """What turns jobs into vectors. Its methods raise ServerErrors."""

    @property
    def source(self) -> ModelSource:
        """Where the model came from."""

    @property
    def family(self) -> Family:
        """What kind of model it is."""

    @property
    def prompts(self) -> Mapping[str, str]:
        """Name -> prefix, of the model's own files."""

    @property
    def dimensions(self) -> int:
        """D, the numbers of a vector."""

    @property
    def matryoshka_dimensions(self) -> tuple[int, ...]:
        """Below D, what the model was trained to be cut to."""

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint's files."""

    @property
    def limits(self) -> EngineLimits: ...

    @property
    def runners(self) -> list[RunnerInfo]:
        """What the ready workers run on."""

    @property
    def not_ready(self) -> str | None:
        """Why no more jobs should be sent here now; None when they are welcome."""

    @property
    def draining(self) -> bool:
        """Whether the server is about to end: each answer is the last of its connection."""

    async def embed(self, job: EmbedJob, key_name: str = "") -> EmbedResult:
        """Cancelling it frees what waits. key_name: of the key that it came with; turns and shares
        of the queue go by it."""

    async def tokenize(self, job: EmbedJob) -> list[Encoding]:
        """One Encoding for each input, as `embed` would run it."""
