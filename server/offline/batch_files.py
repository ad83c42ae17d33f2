"""OpenAI's batch files: a line is a request to /v1/embeddings, the answer a line of its own.

A request that is refused is answered with its error, as over HTTP; the others are not touched. A
line that is no request refuses the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from model.batch import Encoding, num_tokens
from model.errors import did_you_mean
from model.fingerprint import kind_of_vectors, of_vectors
from server.api import parsing, schemas, serialize
from server.api.encoding_options import Reading, encoding_options, inputs_of, vector_format
from server.api.hints import ignored_names
from server.api.instructions import Defaults
from server.api.names import ServedNames
from server.api.openai_errors import error_body
from server.engine.averaging import averaged
from server.engine.inputs import InputTokenizer
from server.errors import DeviceMemoryError, NonFiniteVectorError, ServerError
from server.offline.job import Refusal
from server.offline.places import Place, Refused, place_of
from server.offline.sources import Source
from server.offline.text_files import read_objects

if TYPE_CHECKING:
    from model.encoder import Encoder

logger = logging.getLogger("nv_embed.encode")

_FIELDS = ("custom_id", "method", "url", "body")
_SAID_AT_MOST = 10
_INPUT_BYTES = 2048
"""What an input of a request weighs beside its text: about a vector."""


class BatchLine(NamedTuple):
    """One request: `body` as it would come over HTTP."""

    place: Place
    number: int
    custom_id: str
    body: bytes
    inputs: int  # how many vectors it asks for, at most

    @property
    def key(self) -> bytes:
        return self.custom_id.encode() + b"\0" + self.body

    @property
    def weight(self) -> int:
        return len(self.body) + _INPUT_BYTES * self.inputs


def read_requests(source: Source, place: Place | None = None) -> Iterator[BatchLine | Refused]:
    """The lines of a batch file. Raises InputFileError for one that is no request, or yields it."""
    place = place or place_of(source)
    for row in read_objects(source, place):
        if isinstance(row, Refused):
            yield row
            continue
        number, line = row
        if why := _wrong(line):
            yield place.refused(number, why)
            continue
        body = line.get("body")
        inputs = body.get("input") if isinstance(body, dict) else None
        count = len(inputs) if isinstance(inputs, list) and not _is_ids(inputs) else 1
        # Not orjson, which writes NaN as null: over HTTP these are not the same.
        yield BatchLine(place, number, line["custom_id"], json.dumps(body).encode(), count)


def _wrong(line: dict[str, Any]) -> str | None:
    """Why a line is no request."""
    if unknown := [name for name in line if name not in _FIELDS]:
        return (
            f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], _FIELDS)}; "
            f"known: {', '.join(_FIELDS)}"
        )
    if not isinstance(line.get("custom_id"), str):
        return "no custom_id"
    if line.get("method", "POST") != "POST":
        return f"method is {line['method']!r}, only POST is served"
    if line.get("url") not in schemas.EMBEDDINGS_PATHS:
        return f"url is {line.get('url')!r}, only {schemas.EMBEDDINGS_PATHS[0]} is served"
    return None


def _is_ids(inputs: list[Any]) -> bool:
    return bool(inputs) and isinstance(inputs[0], int)


@dataclass(frozen=True, slots=True)
class BatchAnswers:
    """How requests are tokenized and answered; `tokenize` is a Tokenize."""

    encoder: Encoder
    tokenizer: InputTokenizer
    names: ServedNames
    defaults: Defaults
    truncated_dimensions: bool
    matryoshka_dimensions: tuple[int, ...]
    checkpoint: str  # its fingerprint
    reading: Reading
    _said: set[str] = field(default_factory=set)  # of ignored fields, each once

    def tokenize(self, lines: Sequence[BatchLine], indices: Sequence[int]) -> _Answers:
        requests = [self._read(line) for line in lines]
        encodings = [e for request in requests if isinstance(request, tuple) for e in request[1]]
        return _Answers(encodings, lines, requests, indices, {}, self._fingerprint)

    def _fingerprint(self, wire: schemas.EmbeddingsRequest) -> str:
        info, family = self.encoder.runner.info, self.tokenizer.tokenizer.family
        kind = kind_of_vectors(info.dtype, info.quantization)
        return of_vectors(self.checkpoint, family, wire.dimensions or info.width, kind)

    def _read(
        self, line: BatchLine
    ) -> tuple[schemas.EmbeddingsRequest, list[Encoding]] | ServerError:
        try:
            wire, unknown = parsing.read_body(schemas.EmbeddingsRequest, line.body)
            self._say_ignored(unknown)
            options = encoding_options(wire, wire.model, self.names, self.defaults)
            inputs, _ = inputs_of(wire, options.side, self.reading)
            width = self.encoder.runner.info.width
            vector_format(wire).check(width, self.truncated_dimensions, self.matryoshka_dimensions)
            wire.model = self.names.shown(wire.model)
            return wire, self.tokenizer.tokenize(inputs, options)
        except ServerError as error:
            return error

    def _say_ignored(self, names: Sequence[str]) -> None:
        """As the header of an answer over HTTP does."""
        if not names or len(self._said) >= _SAID_AT_MOST:
            return
        said = ignored_names(names, parsing.known_fields(schemas.EmbeddingsRequest))
        if said not in self._said:
            self._said.add(said)
            logger.warning("fields of requests that nobody knows are ignored: %s", said)


@dataclass(frozen=True, slots=True)
class _Answers:
    """Work on the requests of one shard."""

    encodings: list[Encoding]
    lines: Sequence[BatchLine]
    requests: Sequence[tuple[schemas.EmbeddingsRequest, list[Encoding]] | ServerError]
    indices: Sequence[int]  # of the requests in the output
    lost: dict[int, None]  # indices of encodings that did not fit into memory
    fingerprint: Callable[[schemas.EmbeddingsRequest], str]
    refusals: list[Refusal] = field(default_factory=list)  # none: each is answered

    @property
    def rows(self) -> int:
        return len(self.lines)

    def check(self, indices: Sequence[int], rows: NDArray[np.float32], lost: Sequence[int]) -> None:
        self.lost.update(dict.fromkeys(lost))  # the others do not suffer

    def write(self, file: BinaryIO, vectors: NDArray[np.float32]) -> None:
        start = 0
        for index, line, request in zip(self.indices, self.lines, self.requests, strict=True):
            if isinstance(request, tuple):
                wire, encodings = request
                rows = range(start, start + len(encodings))
                start += len(encodings)
                answered = self._answer(wire, encodings, rows, vectors)
            else:
                answered = request
            facts: dict[str, Any] = {}
            if isinstance(answered, ServerError):
                status, body = answered.status, orjson.dumps(error_body(answered))
            else:
                status, body = 200, answered
                facts["fingerprint"] = self.fingerprint(wire)
                if cut := [e.input(place) for place, e in enumerate(encodings) if e.is_cut]:
                    facts["truncated"] = cut
            answer = {
                "id": f"batch_req_{index}",
                "custom_id": line.custom_id,
                "response": {
                    "status_code": status,
                    "request_id": f"req_{index}",
                    "body": orjson.Fragment(body),
                    **facts,
                },
                "error": None,
            }
            file.write(orjson.dumps(answer) + b"\n")

    def _answer(
        self,
        wire: schemas.EmbeddingsRequest,
        encodings: Sequence[Encoding],
        rows: range,
        vectors: NDArray[np.float32],
    ) -> bytes | ServerError:
        """The body, or what is wrong with the request's vectors. rows: theirs."""
        assert wire.model is not None  # BatchAnswers has put it
        for place, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
            if row in self.lost:
                return DeviceMemoryError.of(encoding.input(place), len(encoding))
            if not np.isfinite(vectors[row]).all():
                return NonFiniteVectorError.of(encoding.input(place))
        own = averaged(encodings, list(vectors[rows.start : rows.stop]))
        how = vector_format(wire)
        try:
            how.check_vectors(own)
        except ServerError as error:
            return error
        return serialize.embeddings_body(
            own,
            model=wire.model,
            tokens=num_tokens(encodings),
            how=how,
            spans=[encoding.span for encoding in encodings if encoding.span is not None],
        )
