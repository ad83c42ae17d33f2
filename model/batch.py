"""The domain types that every layer shares. Owns no behaviour; knows neither torch nor text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Quantization = Literal["none", "int8", "int8-dynamic", "float8"]
"""How weights are kept: model.linear.quantization."""
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 8192
"""Tokens in one forward unless an option says otherwise. On a CPU more costs latency and gains no
throughput."""
BATCH_SEQS = 256
"""Inputs in one forward, likewise; more would gain nothing."""


def default_batch_tokens(device: str) -> int:
    """device: cpu, cuda, cuda:N."""
    return GPU_BATCH_TOKENS if device.startswith("cuda") else CPU_BATCH_TOKENS


class Span(NamedTuple):
    """A run of an input's ids that has a vector of its own, out of the forward of all of them."""

    end: int  # the position behind its last id, counted from BOS
    sequence: bytes = b""  # a digest of the ids of the whole input
    tokens: tuple[int, int] = (0, 0)  # of the text's own, the second not included
    characters: tuple[int, int] = (0, 0)  # likewise


class Part(NamedTuple):
    """Where an input was too long for one sequence and became several."""

    input: int  # which of the request's
    weight: int  # how many ids of its text are in this one


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """One tokenized input, a part of one, or a span of one.

    ids: int32 [n], BOS and (unless truncated) EOS included. The spans of one input follow each
        other and share this array.
    pool_start: how many leading positions stay out of the pool (BOS and instruction).
    is_cut: whether there was more of it.
    span: where the pool ends before the sequence does.
    """

    ids: NDArray[np.int32]
    pool_start: int = 0
    is_cut: bool = False
    span: Span | None = None
    part: Part | None = None

    def __post_init__(self) -> None:
        assert self.ids.dtype == np.int32, self.ids.dtype
        end = len(self.ids) if self.span is None else self.span.end
        assert 0 <= self.pool_start < end <= len(self.ids), (self.pool_start, end, len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def input(self, index: int) -> int:
        """Which of a request's inputs it is of; index: its place among the encodings."""
        if self.span is not None:  # then there is one input
            return 0
        return index if self.part is None else self.part.input

    @property
    def key(self) -> bytes:
        """Equal for equal inputs only: ids and where the pool starts; and ends, for a span."""
        start = self.pool_start.to_bytes(4, "little")
        if self.span is None:
            return start + self.ids.tobytes()
        return b"span" + start + self.span.end.to_bytes(4, "little") + self.span.sequence

    def __repr__(self) -> str:
        return f"Encoding({len(self.ids)} tokens, pool_start={self.pool_start})"


def continues(encoding: Encoding, before: Encoding | None) -> bool:
    """Whether it is another span of the sequence of the one before it."""
    if encoding.span is None or before is None or before.span is None:
        return False
    return encoding.ids is before.ids


def sequence_lengths(encodings: Sequence[Encoding]) -> list[int]:
    """Of a forward of these: a sequence is one, however many spans of it follow."""
    lengths, before = [], None
    for encoding in encodings:
        if encoding.span is None or not continues(encoding, before):
            lengths.append(len(encoding.ids))
        before = encoding
    return lengths


def num_tokens(encodings: Sequence[Encoding]) -> int:
    """Tokens of a forward of these."""
    return sum(sequence_lengths(encodings))


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold. A sequence longer than `max_tokens` runs alone."""

    max_tokens: int
    max_seqs: int
    half_beside_query: bool = True
    """A batch with a query aboard holds half as much of requests that it leaves unfinished."""


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What an engine worker is told about the model it runs; plain values, to cross a wire."""

    path: str  # the checkpoint folder
    family: str = "auto"  # a name of model.families; auto: by what the folder says
    device: str = "cpu"  # cpu, cuda, cuda:N
    dtype: str = "auto"
    quantization: str = "none"
    attention: str = "auto"
    threads: int | None = None  # CPU threads; None: torch's own choice
    max_batch_tokens: int = CPU_BATCH_TOKENS
    max_batch_seqs: int = BATCH_SEQS
    max_input_tokens: int = 32_768
    cuda_graphs: bool | Literal["auto"] = False  # auto: where they can be recorded
    cpu_products: str = "auto"  # auto, plain, allow-slow: model.platform.products
    products: dict[str, str] = field(default_factory=dict)  # kind -> who must compute it on a CPU
    fused_kernels: str = "plain"  # plain, triton: model.fused
    fingerprint: str | None = None  # of the checkpoint that it must be; None: whichever is there


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What a runner turned out to be, for the log and `/info`."""

    device: str
    device_name: str
    dtype: str
    quantization: str
    attention: str
    width: int  # of the vectors it returns
    cuda_graphs: bool = False
    fused_kernels: str = "plain"
    products: dict[str, str] = field(default_factory=dict)  # kind of product -> who computes it
