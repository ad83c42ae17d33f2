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
from server.api.vector_format import VectorFormat
from server.errors import InvalidRequestError
from server.offline.columns import Columns
from server.offline.job import Job, Refusal, Rows, Tokenize
from server.offline.places import InputFileError, Line
from server.offline.text_files import read_texts

if TYPE_CHECKING:
    from model.encoder import Encoder

_WINDOW_CHARS = 4 << 20
"""Texts that are tokenized at once: tokens take about 30 times the memory of the text."""


def text_rows(field: str, columns: Columns) -> Rows[Line]:
    """The rows of a run on plain texts, with what is kept beside them checked."""
    if not columns:
        return Rows(
            lambda source, place: read_texts(source, field, place),
            key=lambda line: line.text.encode(),
            weight=lambda line: len(line.text),
        )
    return Rows(
        lambda source, place: (
            line.place.refused(line.number, why)
            if isinstance(line, Line) and (why := columns.problem(line.values))
            else line
            for line in read_texts(source, field, place, columns.names)
        ),
        key=lambda line: line.text.encode() + b"\0" + repr(line.values).encode(errors="replace"),
        weight=lambda line: len(line.text) + len(repr(line.values)),
    )


@dataclass(frozen=True, slots=True)
class _Texts:
    """Work on plain texts."""

    encodings: list[Encoding]
    job: Job
    lines: Sequence[Line]
    indices: Sequence[int]
    refusals: list[Refusal]

    @property
    def rows(self) -> int:
        return len(self.lines)

    def check(self, indices: Sequence[int], rows: NDArray[np.float32], lost: Sequence[int]) -> None:
        if lost:
            raise self._error(lost[0], "the text does not fit into the device's memory")
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise self._error(indices[bad[0]], "the model returned a non-finite vector")
        for index, row in zip(indices, rows, strict=True):
            try:
                VectorFormat(self.job.format.dtype).check_vectors([row])
            except InvalidRequestError as error:
                raise self._error(index, error.message.removeprefix("input[0] ")) from None

    def write(self, file: BinaryIO, vectors: NDArray[np.float32]) -> None:
        columns = self.job.columns
        kept = columns.written([line.values for line in self.lines])
        typed = {name: (values, columns.arrow_type) for name, values in kept.items()}
        self.job.format.write(file, vectors, self.indices, typed)

    def _error(self, index: int, what: str) -> InputFileError:
        line = self.lines[index]
        return InputFileError(f"{line.place.at(line.number)}: {what}")


def texts(job: Job, encoder: Encoder, prompt: Prompt) -> Tokenize[Line]:
    """How shards of texts are tokenized. It raises InputFileError for one that cannot be used,
    unless those are skipped."""

    def tokenize(lines: Sequence[Line], indices: Sequence[int]) -> _Texts:
        encodings, used, refusals = [], [], []
        at = 0
        for window in _windows(lines):
            results = encoder.tokenizer.encode_batch(
                [line.text for line in window],
                prompt,
                max_tokens=encoder.max_tokens,
                truncate=job.truncate,
            )
            for line, result in zip(window, results, strict=True):
                if isinstance(result, InputError):
                    refused = line.place.refused(line.number, f"{result}")
                    refusals.append(Refusal(at, line.place.span, refused.number, refused.why))
                else:
                    encodings.append(result)
                    used.append(at)
                at += 1
        kept = lines if not refusals else [lines[place] for place in used]
        return _Texts(encodings, job, kept, [indices[place] for place in used], refusals)

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
    if window:
        yield window
