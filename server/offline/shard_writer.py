"""One shard from its rows to its file, and all that a process needs to write some.

A Recipe is what can be sent to another process, or another machine; the ShardWriter that it makes
there writes a shard that is the same to the byte wherever that is. Knows nothing of slices that
others read, nor of manifests.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic

import numpy as np

from model.batch import BatchLimits, RunnerInfo, RunnerOptions
from model.fingerprint import fingerprint, kind_of_vectors, of_vectors
from model.hub import ModelSource
from model.platform import resources
from model.prompts import Prompt
from model.tokenizer import NVEmbedTokenizer
from server.api.encoding_options import Reading
from server.api.instructions import Defaults
from server.api.names import ServedNames
from server.engine.inputs import InputTokenizer
from server.engine.worker import load_factory
from server.offline.batch_files import BatchAnswers
from server.offline.job import Job, Row, Rows, Tokenize
from server.offline.manifest import Settled
from server.offline.parts import Parts, Proof, SliceEnd, Written
from server.offline.shards import Chunk, chunks_of
from server.offline.slices import Slice
from server.offline.sources import Source
from server.offline.texts import texts

if TYPE_CHECKING:
    from model.encoder import Encoder

Advance = Callable[[int], None]
"""Called with how many more rows are done."""


class ShardWriter(Generic[Row]):
    """Writes shards with one encoder. `rows_kept`: of the shard that it failed in, on disk."""

    def __init__(
        self, parts: Parts, encoder: Encoder, tokenize: Tokenize[Row], *, run: str, every: float
    ) -> None:
        """run: names what the vectors depend on. every: seconds after which finished batches of a
        shard are kept."""
        self._parts, self._encoder, self._tokenize = parts, encoder, tokenize
        self._run, self._every = run, every
        self.rows_kept = 0

    def write(self, chunk: Chunk[Row], first_index: int, advance: Advance) -> Written:
        """first_index: of the shard's first row in the output. Raises InputFileError for a row
        that cannot be embedded."""
        shard = chunk.shard
        work = self._tokenize(chunk.rows, [first_index + place for place in chunk.places])
        width = self._encoder.runner.info.width
        vectors = np.empty((len(work.encodings), width), dtype=np.float32)
        lengths = np.array([len(encoding) for encoding in work.encodings], dtype=np.int64)
        todo = max(int(lengths.sum()), 1)

        keeper = self._parts.keeper(shard, width, self._every, self._run)
        done = keeper.recall(vectors)
        tokens, told = int(lengths[sorted(done)].sum()), 0
        try:
            with keeper:
                for indices, rows, lost in self._encoder.batches(work.encodings, done):
                    work.check(indices, rows, lost)
                    vectors[indices] = rows
                    if not lost:
                        keeper.add(indices, rows)
                    tokens += int(lengths[[i for i in indices if i not in done]].sum())
                    reached = int(shard.rows * tokens / todo)
                    advance(reached - told)
                    told = reached
        finally:
            share = keeper.rows / max(len(vectors), 1)
            self.rows_kept = int(shard.rows * min(share, 1))
        with self._parts.replacing(self._parts.path(shard.key)) as file:
            work.write(file, vectors)
            proof = Proof.of(file, shard.digest)
        keeper.forget()
        advance(shard.rows - told)
        self.rows_kept = 0
        refused = [*chunk.refusals]
        refused += [one._replace(row=chunk.places[one.row]) for one in work.refusals]
        refused.sort()
        return Written(
            *shard.key,
            shard.first,
            shard.rows,
            work.rows,
            proof.size,
            proof.sha256,
            proof.made_of,
            tuple(tuple(one) for one in refused),  # type: ignore[misc]
        )

    def write_slice(
        self,
        which: Slice,
        sources: Sequence[Source],
        rows: Rows[Row],
        job: Job,
        has: Callable[[Any], bool],
        advance: Advance = lambda rows: None,
    ) -> Iterator[Written | SliceEnd]:
        """All shards of a slice, for a folder, but those that `has` says are there."""
        for one in chunks_of(which, sources, rows, job.shard_size, skip=job.skip):
            if isinstance(one, SliceEnd):
                yield one
            elif not has(one.shard):
                yield self.write(one, which.first_index + one.shard.first, advance)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How vectors are made, and where shards go; it can be pickled. arguments: of the call."""

    arguments: argparse.Namespace
    model: ModelSource
    job: Job
    mode: int
    prompt: Prompt
    defaults: Defaults
    settled: Settled  # what an earlier run, or another process of this one, found for `auto`
    every: float

    @property
    def checkpoint(self) -> str:
        return fingerprint(self.model.path)

    def vectors(self, info: RunnerInfo) -> str:
        """The fingerprint of the vectors."""
        kind = kind_of_vectors(info.dtype, info.quantization)
        return of_vectors(self.checkpoint, self.model.config().family, info.width, kind)

    def encoder(self, device: str, threads: int | None = None) -> Encoder:
        """Raises CheckpointError, UnsupportedError."""
        with resources.for_good():
            from model.encoder import Encoder

        asked = self.arguments
        if asked.runner:
            encoder = self._encoder_around(device)
        else:
            encoder = Encoder(
                self.model,
                device=device,
                dtype=(self.settled.dtype if asked.dtype == "auto" else None) or asked.dtype,
                quantization=asked.quantization,
                attention=asked.attention,
                threads=threads or asked.threads,
                cpu_products=asked.cpu_products,
                products=self.settled.products,
                fused_kernels=asked.fused_kernels,
                max_batch_tokens=asked.max_batch_tokens,
            )
        if asked.max_input_tokens:
            most = self.model.config().most_input_tokens
            encoder.max_tokens = min(most, asked.max_input_tokens)
        return encoder

    def _encoder_around(self, device: str) -> Encoder:
        """With another runner than the model, for tests and benchmarks."""
        from model.encoder import Encoder

        asked = self.arguments
        options = RunnerOptions(
            path=str(self.model.path),
            family=self.model.family,
            device="cpu" if device == "auto" else device,
            dtype=self.settled.dtype or asked.dtype,
            products=self.settled.products,
        )
        most_tokens = asked.max_batch_tokens or options.max_batch_tokens
        return Encoder.of(
            NVEmbedTokenizer.from_dir(self.model.path, self.model.family),
            load_factory(asked.runner)(options),
            BatchLimits(most_tokens, options.max_batch_seqs),
            max_tokens=options.max_input_tokens,
        )

    def writer(self, encoder: Encoder, run: str) -> ShardWriter[Any]:
        parts = self.job.parts(self.mode)
        tokenize = self._tokenize(encoder)
        return ShardWriter(parts, encoder, tokenize, run=run, every=self.every)

    def _tokenize(self, encoder: Encoder) -> Tokenize[Any]:
        if not self.arguments.openai_batch:
            return texts(self.job, encoder, self.prompt)
        config = self.model.config()
        return BatchAnswers(
            encoder,
            InputTokenizer(encoder.tokenizer, encoder.max_tokens, self.arguments.truncate),
            ServedNames(self.model.model_id),
            self.defaults,
            self.arguments.allow_truncated_dimensions,
            config.matryoshka_dimensions,
            self.checkpoint,
            Reading.of(self.arguments, config.family),
        ).tokenize
