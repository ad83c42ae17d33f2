"""Offline API: texts in, vectors out, without a server.

from model.encoder import Encoder
from model.tokenizer import query_prefix
encoder = Encoder("nvidia/NV-Embed-v2")
prefix = query_prefix("Given a question, retrieve passages that answer the question")
queries = encoder.encode(["why is the sky blue?"], instruction=prefix)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.batch import (
    BATCH_SEQS,
    BatchLimits,
    Encoding,
    RunnerOptions,
    continues,
    default_batch_tokens,
)
from model.errors import NoMemoryError, NonFiniteError
from model.fitting import FittingRunner
from model.hub import ModelSource, locate
from model.prompts import Prompt
from model.runner import ModelRunner, Runner
from model.tokenizer import NVEmbedTokenizer, Truncation

_WINDOW = 16_384
"""Texts that are tokenized and sorted by length together."""


class EmbeddedBatch(NamedTuple):
    """Indices of encodings and their vectors, float32 [n, D], which may be non-finite."""

    indices: list[int]
    rows: NDArray[np.float32]
    too_large: list[int]  # indices that do not fit even alone; their rows are no vectors


class Encoder:
    """A tokenizer and a runner in this process. Vectors are float32 [N, D], of length 1."""

    def __init__(
        self,
        model: str | Path | ModelSource | None = None,
        *,
        revision: str | None = None,
        offline: bool = False,
        family: str = "auto",
        device: str = "auto",
        dtype: str = "auto",
        quantization: str = "none",
        attention: str = "auto",
        threads: int | None = None,
        cpu_products: str = "auto",
        products: dict[str, str] | None = None,
        fused_kernels: str = "plain",
        max_batch_tokens: int | None = None,
        max_batch_seqs: int = BATCH_SEQS,
    ) -> None:
        """Load `model`, a folder, a hub id or what `locate` found; by default the small model
        that ships.

        The options are the server's (README.md). products: kind -> who must compute it on a CPU,
        as `runner.info.products` of another process says it: the same numbers to the last bit.

        Raises CheckpointError or UnsupportedError.
        """
        if isinstance(model, ModelSource):
            source = model
        else:
            name = None if model is None else str(model)
            source = locate(name, revision=revision, offline=offline, family=family)
        tokenizer = NVEmbedTokenizer.from_dir(source.path, source.family)
        runner = ModelRunner(
            RunnerOptions(
                path=str(source.path),
                family=source.family,
                device=device,
                dtype=dtype,
                quantization=quantization,
                attention=attention,
                threads=threads,
                cpu_products=cpu_products,
                products=products or {},
                fused_kernels=fused_kernels,
            )
        )
        default = default_batch_tokens(runner.device.type)
        limits = BatchLimits(max_batch_tokens or default, max_batch_seqs)
        self._setup(tokenizer, runner, limits, runner.config.max_input_tokens)

    @classmethod
    def of(
        cls, tokenizer: NVEmbedTokenizer, runner: Runner, limits: BatchLimits, max_tokens: int
    ) -> Encoder:
        """An Encoder around parts that exist already."""
        encoder = cls.__new__(cls)
        encoder._setup(tokenizer, runner, limits, max_tokens)
        return encoder

    def _setup(
        self, tokenizer: NVEmbedTokenizer, runner: Runner, limits: BatchLimits, max_tokens: int
    ) -> None:
        self.tokenizer, self.runner, self.limits = tokenizer, runner, limits
        self.max_tokens = max_tokens
        self._fitting = FittingRunner(runner)

    def encode(
        self,
        texts: Sequence[str],
        instruction: str | Prompt = "",
        *,
        max_tokens: int | None = None,
        truncate: Truncation = Truncation.NONE,
        progress: bool | None = None,
    ) -> NDArray[np.float32]:
        """-> [len(texts), D], in the order of `texts`.

        instruction: what stands around each text: verbatim before it, or a Prompt, as
        `tokenizer.family.prompt` makes it.
        max_tokens: the limit of one input, by default the model's own.
        progress: a bar on stderr; None means when stderr is a terminal.
        Raises InputTooLongError (naming the text), EmptyPoolError, NonFiniteError, NoMemoryError.
        """
        max_tokens = max_tokens or self.max_tokens
        vectors = np.empty((len(texts), self.runner.info.width), dtype=np.float32)
        disable = None if progress is None else not progress
        with tqdm(total=len(texts), desc="Embedding", unit=" texts", disable=disable) as bar:
            for first in range(0, len(texts), _WINDOW):
                window = texts[first : first + _WINDOW]
                encodings = self._tokenize(window, first, instruction, max_tokens, truncate)
                for batch, rows in self._batches(encodings, first):
                    vectors[[first + i for i in batch]] = rows
                    bar.update(len(batch))
        return vectors

    def embed(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        """-> [len(encodings), D], in their order. Raises NonFiniteError, NoMemoryError."""
        vectors = np.empty((len(encodings), self.runner.info.width), dtype=np.float32)
        for batch, rows in self._batches(encodings, first=0):
            vectors[batch] = rows
        return vectors

    def batches(
        self, encodings: Sequence[Encoding], done: AbstractSet[int] = frozenset()
    ) -> Iterator[EmbeddedBatch]:
        """All of `encodings`, a batch at a time; batches whose indices are all `done` are left out.

        Which inputs share a batch does not depend on `done`, so that a run that goes on gives the
        same bits as one that was never interrupted.
        """
        for batch in batches_by_length(encodings, self.limits):
            if not done >= set(batch):
                rows, too_large = self._fitting.embed([encodings[i] for i in batch])
                yield EmbeddedBatch(batch, rows, [batch[row] for row in too_large])

    def _batches(
        self, encodings: Sequence[Encoding], first: int
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Indices of a batch and its rows, batch by batch; `first` is the number of index 0."""
        for batch, rows, too_large in self.batches(encodings):
            if too_large:
                raise NoMemoryError([first + index for index in too_large])
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad.size:
                raise NonFiniteError([first + batch[row] for row in bad])
            yield batch, rows

    def _tokenize(
        self,
        texts: Sequence[str],
        first: int,
        instruction: str | Prompt,
        max_tokens: int,
        truncate: Truncation,
    ) -> list[Encoding]:
        encodings = []
        results = self.tokenizer.encode_batch(
            texts, instruction, max_tokens=max_tokens, truncate=truncate
        )
        for index, result in enumerate(results, first):
            if isinstance(result, Exception):
                result.index = index
                result.add_note(f"in texts[{index}]")
                raise result
            encodings.append(result)
        return encodings


def batches_by_length(encodings: Sequence[Encoding], limits: BatchLimits) -> list[list[int]]:
    """Indices of `encodings`, longest first, cut into batches within `limits`."""
    batches: list[list[int]] = []
    tokens = 0
    before: Encoding | None = None
    for index in sorted(range(len(encodings)), key=lambda i: -len(encodings[i])):
        encoding = encodings[index]
        length = 0 if continues(encoding, before) else len(encoding)
        fits = batches and tokens + length <= limits.max_tokens
        if not fits or len(batches[-1]) == limits.max_seqs:
            batches.append([])
            tokens, length = 0, len(encoding)
        batches[-1].append(index)
        tokens += length
        before = encoding
    return batches
