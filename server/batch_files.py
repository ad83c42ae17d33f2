"""OpenAI's batch files: a line is a request to /v1/embeddings, the answer a line of its own.

A request that is refused is answered with its error, as over HTTP; the others are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from model.batch import Encoding
from server import schemas, serialize
from server.errors import InvalidRequestError, ServerError
from server.inputs import InputTokenizer, tokenization_of
from server.instructions import Defaults
from server.names import ServedNames
from server.text_files import InputFileError, read_objects

if TYPE_CHECKING:
    from model.encoder import Encoder

URLS = ("/v1/embeddings", "/embeddings")


def read_requests(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a batch file, each with its custom_id, url and body."""
    for number, line in enumerate(read_objects(path), 1):
        if not isinstance(line.get("custom_id"), str):
            raise InputFileError(f"{path}, line {number}: no custom_id")
        if line.get("url") not in URLS:
            raise InputFileError(
                f"{path}, line {number}: url is {line.get('url')!r}, only {URLS[0]} is served"
            )
        yield line


class BatchAnswers:
    """Makes shards of answers: `write` is a bulk.WriteShard."""

    def __init__(
        self, encoder: Encoder, tokenizer: InputTokenizer, names: ServedNames, defaults: Defaults
    ) -> None:
        self._encoder, self._tokenizer = encoder, tokenizer
        self._names, self._defaults = names, defaults

    def write(self, file: BinaryIO, lines: Sequence[dict[str, Any]], first: int) -> None:
        requests = [self._read(line) for line in lines]
        encodings = [e for request in requests if isinstance(request, tuple) for e in request[1]]
        vectors = iter(self._encoder.embed(encodings))
        for index, (line, request) in enumerate(zip(lines, requests, strict=True), first):
            if isinstance(request, ServerError):
                status, body = request.status, orjson.dumps(request.body())
            else:
                wire, its_encodings = request
                status, body = 200, self._answer(wire, its_encodings, vectors)
            answer = {
                "id": f"batch_req_{index}",
                "custom_id": line["custom_id"],
                "response": {
                    "status_code": status,
                    "request_id": f"req_{index}",
                    "body": orjson.Fragment(body),
                },
                "error": None,
            }
            file.write(orjson.dumps(answer) + b"\n")

    def _read(
        self, line: dict[str, Any]
    ) -> tuple[schemas.EmbeddingsRequest, list[Encoding]] | ServerError:
        try:
            wire = schemas.parse_body(schemas.EmbeddingsRequest, orjson.dumps(line.get("body")))
            how = tokenization_of(wire, wire.model, self._names, self._defaults)
            encodings = self._tokenizer.tokenize(schemas.parse_inputs(wire.input), how)
            width = self._encoder.runner.info.width
            if wire.dimensions not in (None, width):
                raise InvalidRequestError(f"This model has {width} dimensions", param="dimensions")
        except ServerError as error:
            return error
        return wire, encodings

    @staticmethod
    def _answer(
        wire: schemas.EmbeddingsRequest, encodings: Sequence[Encoding], vectors: Iterator[Any]
    ) -> bytes:
        return serialize.embeddings_body(
            [next(vectors) for _ in encodings],
            model=wire.model,
            tokens=sum(map(len, encodings)),
            base64=wire.encoding_format == "base64",
        )
