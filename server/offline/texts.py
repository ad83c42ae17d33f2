"""Work on plain texts: lines of a text file, fields of JSON lines, cells of a column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding
from model.errors import InputError
from model.prompts import Prompt
from server.offline.job import Job, Tokenize
from server.offline.sources import Source
from server.offline.text_files import InputFileError, Line

if TYPE_CHECKING:
    from model.encoder import Encoder

_WINDOW_CHARS = 4 << 20
"""Texts that are tokenized at once: tokens take about 30 times the memory of the text."""


@dataclass(frozen=True, slots=True)
class _Texts:
    """Work on plain texts."""

    encodings: list[Encoding]
    job: Job
    source: Source
    lines: Sequence[Line]
    first: int

    def check(self, indices: Sequence[int], rows: NDArray[np.float32], lost: Sequence[int]) -> None:
        if lost:
            raise self._error(lost[0], "the text does not fit into the device's memory")
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise self._error(indices[bad[0]], "the model returned a non-finite vector")

    def write(self, file: BinaryIO, vectors: NDArray[np.float32]) -> None:
        self.job.format.write(file, vectors, self.first)

    def _error(self, index: int, what: str) -> InputFileError:
        return InputFileError(f"{self.source.at(self.lines[index].number)}: {what}")


def texts(job: Job, source: Source, encoder: Encoder, prompt: Prompt) -> Tokenize[Line]:
    """How shards of texts are tokenized. It raises InputFileError for one that cannot be used."""

    def tokenize(lines: Sequence[Line], first: int) -> _Texts:
        encodings = []
        for window in _windows(lines):
            results = encoder.tokenizer.encode_batch(
                [line.text for line in window],
                prompt,
                max_tokens=encoder.max_tokens,
                truncate=job.truncate,
            )
            for line, result in zip(window, results, strict=True):
                if isinstance(result, InputError):
                    raise InputFileError(f"{source.at(line.number)}: {result}")
                encodings.append(result)
        return _Texts(encodings, job, source, lines, first)

    return tokenize


def _windows(lines: Sequence[Line]) -> Iterator[list[Line]]:
    window: list[Line] = []
    chars = 0
    for line in lines:
        if window and chars + len(line.text) > _WINDOW_CHARS:
            yield window
            window, chars = [], 0
        window.append(line)
        chars += len(line.text)
    yield window
