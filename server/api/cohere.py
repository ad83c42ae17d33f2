"""Cohere's dialect: /v1/embed and /v2/embed. Its rerank is with the others in `rerank`.

Texts that are too long are cut at their end unless a request says otherwise, as there; which were
cut stands in the answer's `meta.warnings`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, StrictInt, StrictStr

from model.tokenizer import Truncation
from server.api import serialize
from server.api.answers import AnswerWriter
from server.api.body import BodyReader, hold
from server.api.dialect_request import DialectRequest
from server.api.disconnects import patience
from server.api.embedding import Embedding, ranges
from server.api.openai_errors import error_in
from server.api.routing import RequestRoute
from server.api.schemas import InstructedInput
from server.api.vector_format import OutputDtype, VectorFormat
from server.api.wire import truncation
from server.engine.interface import EmbedResult
from server.errors import InvalidRequestError, ServerError
from server.settings import Settings

PATHS = ("/v2/embed", "/v1/embed")
_TYPES: dict[str, tuple[OutputDtype, bool]] = {
    "float": ("float32", False),
    "base64": ("float32", True),
    **{name: (name, False) for name in ("int8", "uint8", "binary", "ubinary")},
}
"""Name of an embedding type -> its numbers, and whether they are in base64."""
_Type = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
_VALUE_BYTES = 4 + 13
_PIECE_CHARS = 256 * 1024
_CHARS_OF_A_VALUE = 16
"""Characters that take as long to write as one number."""


class CohereRequest(DialectRequest):
    model: StrictStr | None = None
    texts: Any = None
    inputs: Any = None
    images: Any = None
    input_type: StrictStr | None = None
    embedding_types: list[_Type] | None = None
    output_dimension: StrictInt | None = Field(None, ge=1)
    truncate: Annotated[Truncation | None, BeforeValidator(truncation)] = None
    max_tokens: StrictInt | None = Field(None, ge=2)


class _Endpoints:
    def __init__(self, embedding: Embedding, settings: Settings) -> None:
        self._embedding = embedding
        self._bodies, self._answers = BodyReader(settings.max_body_bytes), AnswerWriter()

    async def embed(self, request: Request) -> Response:
        """Texts as vectors of one or more types."""
        arrived = time.monotonic()
        wire, headers = await self._bodies.read(request, CohereRequest)
        texts = _texts(wire)
        fields = InstructedInput.model_construct(
            input=texts, input_type=wire.input_type, truncate=wire.truncate or Truncation.END
        )
        embedding = self._embedding
        deadline = arrived + patience(request)
        job = embedding.job(request, fields, wire.model, deadline, name="texts")
        if wire.max_tokens is not None:
            job = job._replace(options=job.options._replace(max_tokens=wire.max_tokens))
        formats = {
            name: VectorFormat(*_TYPES[name], dimensions=wire.output_dimension)
            for name in dict.fromkeys(wire.embedding_types or ["float"])
        }
        first, *others = formats.values()
        values = len(texts) * embedding.engine.dimensions
        for how in others:
            embedding.check(how)
            hold(request, values * _VALUE_BYTES)
        result, said = await embedding.embed(request, job, first, "texts")
        for how in others:
            how.check_vectors(result.vectors)
        version = "2" if request.url.path.endswith(PATHS[0]) else "1"
        bare = version == "1" and not wire.embedding_types
        pieces = _pieces(result, formats, texts, version, bare)
        chars = sum(map(len, texts))
        hold(request, chars)
        size = values * len(formats) + chars // _CHARS_OF_A_VALUE
        return await self._answers.response(request, pieces, size, headers | said)


def _texts(wire: CohereRequest) -> list[Any]:
    """Raises InvalidRequestError for what is no text."""
    if wire.images is not None:
        raise InvalidRequestError("images: this model embeds texts", param="images")
    if (wire.texts is None) == (wire.inputs is None):
        raise InvalidRequestError("you must provide the field 'texts'", param="texts")
    if wire.texts is not None:
        if not isinstance(wire.texts, list):
            raise InvalidRequestError("texts must be a list of strings", param="texts")
        return wire.texts
    texts = []
    for index, item in enumerate(wire.inputs if isinstance(wire.inputs, list) else [None]):
        content = item.get("content") if isinstance(item, dict) else None
        part = content[0] if isinstance(content, list) and len(content) == 1 else None
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"inputs[{index}] must have a content of one text", param=f"inputs[{index}]"
            )
        texts.append(part["text"])
    return texts


def _pieces(
    result: EmbedResult,
    formats: dict[str, VectorFormat],
    texts: Sequence[str],
    version: str,
    bare: bool,
) -> Iterator[bytes]:
    kind = "embeddings_floats" if bare else "embeddings_by_type"
    yield b'{"id":"%b","response_type":"%b","embeddings":' % (
        str(uuid.uuid4()).encode(),
        kind.encode(),
    )
    for index, (name, how) in enumerate(formats.items()):
        if not bare:
            yield b'%b"%b":' % (b"," if index else b"{", name.encode())
        yield from serialize.rows_pieces(result.vectors, how)
    meta: dict[str, Any] = {
        "api_version": {"version": version},
        "billed_units": {"input_tokens": result.tokens},
    }
    if result.cut:
        meta["warnings"] = [f"texts were truncated, by index: {ranges(result.cut)}"]
    yield b'%b,"texts":' % (b"" if bare else b"}")
    yield from _written(texts)
    yield b',"meta":%b}' % orjson.dumps(meta)


def _written(texts: Sequence[str]) -> Iterator[bytes]:
    """As a JSON list, in pieces."""
    yield b"["
    waiting: list[bytes] = []
    chars = 0
    for index, text in enumerate(texts):
        waiting.append(orjson.dumps(text))
        chars += len(text)
        if chars >= _PIECE_CHARS and index + 1 < len(texts):
            yield b",".join([*waiting, b""])
            waiting, chars = [], 0
    yield b",".join(waiting) + b"]"


def error_response(error: ServerError) -> Response:
    return error_in({"message": error.message}, error)


def create_router(embedding: Embedding, settings: Settings) -> APIRouter:
    router = APIRouter(route_class=RequestRoute)
    endpoints = _Endpoints(embedding, settings)
    for path in PATHS:
        router.add_api_route(path, endpoints.embed, methods=["POST"], include_in_schema=False)
    return router
