"""The dialect of text-embeddings-inference and of Hugging Face's clients: /embed, /, /similarity.

No model is named there, and an answer is a bare list. Its rerank is with the others in `rerank`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from model.tokenizer import Truncation
from server.api import serialize
from server.api.answers import AnswerWriter
from server.api.body import BodyReader
from server.api.dialect_request import DialectRequest
from server.api.disconnects import patience
from server.api.embedding import Embedding
from server.api.openai_errors import error_in
from server.api.routing import RequestRoute, json_response
from server.api.schemas import InstructedInput
from server.api.vector_format import VectorFormat
from server.api.wire import lower, must_be, truncation
from server.errors import InvalidRequestError, ServerError
from server.settings import Settings

EMBED_PATHS = ("/embed", "/")
SIMILARITY_PATH = "/similarity"
_ERROR_TYPES = {401: "Unauthorized", 429: "Overloaded", 500: "Backend", 503: "Unhealthy"}


class EmbedRequest(DialectRequest):
    inputs: Any
    model: StrictStr | None = Field(None, description="No client sends it; its suffix counts.")
    parameters: dict[str, Any] | None = None
    truncate: Annotated[Truncation | None, BeforeValidator(truncation)] = None
    truncation_direction: Annotated[Literal["left", "right"] | None, BeforeValidator(lower)] = None
    prompt_name: StrictStr | None = None
    prompt: StrictStr | None = None
    normalize: Annotated[StrictBool | None, *must_be(True)] = Field(
        None, description="Vectors have length 1."
    )
    dimensions: StrictInt | None = Field(None, ge=1)

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        """What stands in `parameters` stands beside it as well."""
        inner = body.get("parameters")
        return super()._unfolded({**inner, **body} if isinstance(inner, dict) else body)

    def fields(self, inputs: Any) -> InstructedInput:
        """As this server's own. A false `truncate` refuses, an absent one is the server's."""
        truncate = self.truncate
        if truncate is Truncation.END and self.truncation_direction == "left":
            truncate = Truncation.START
        return InstructedInput.model_construct(
            input=inputs, truncate=truncate, input_type=self.prompt_name, prompt=self.prompt
        )


class _Endpoints:
    def __init__(self, embedding: Embedding, settings: Settings) -> None:
        self._embedding = embedding
        self._bodies, self._answers = BodyReader(settings.max_body_bytes), AnswerWriter()

    async def embed(self, request: Request) -> Response:
        """Inputs as a bare list of vectors; of a sentence and others, their similarities."""
        arrived = time.monotonic()
        wire, headers = await self._bodies.read(request, EmbedRequest)
        if isinstance(wire.inputs, dict):
            return await self._similarities(request, wire, headers, arrived)
        how = VectorFormat(dimensions=wire.dimensions)
        deadline = arrived + patience(request)
        fields = wire.fields(wire.inputs)
        job = self._embedding.job(request, fields, wire.model, deadline, name="inputs")
        result, said = await self._embedding.embed(request, job, how, "inputs")
        values = len(job.inputs) * self._embedding.engine.dimensions
        pieces = serialize.rows_pieces(result.vectors, how)
        return await self._answers.response(request, pieces, values, headers | said)

    async def similarity(self, request: Request) -> Response:
        """How near a sentence is to each of others: cosines."""
        arrived = time.monotonic()
        wire, headers = await self._bodies.read(request, EmbedRequest)
        return await self._similarities(request, wire, headers, arrived)

    async def _similarities(
        self, request: Request, wire: EmbedRequest, headers: dict[str, str], arrived: float
    ) -> Response:
        asked = wire.inputs if isinstance(wire.inputs, dict) else {}
        source, sentences = asked.get("source_sentence"), asked.get("sentences")
        if not isinstance(source, str) or not isinstance(sentences, list):
            raise InvalidRequestError(
                "inputs must have a source_sentence and a list of sentences", param="inputs"
            )
        deadline = arrived + patience(request)
        fields = wire.fields([source, *sentences])
        job = self._embedding.job(request, fields, wire.model, deadline, name="inputs")
        result, said = await self._embedding.embed(request, job, VectorFormat(), "inputs")
        first, *others = result.vectors
        scores = (np.stack(others) @ first).tolist() if others else []
        response = json_response(scores)
        response.headers.update(headers | said)
        return response


def error_response(error: ServerError) -> Response:
    kind = _ERROR_TYPES.get(error.status, "Validation" if error.status < 500 else "Backend")
    return error_in({"error": error.message, "error_type": kind}, error)


def create_router(embedding: Embedding, settings: Settings) -> APIRouter:
    router = APIRouter(route_class=RequestRoute)
    endpoints = _Endpoints(embedding, settings)
    routes = dict.fromkeys(EMBED_PATHS, endpoints.embed)
    routes[SIMILARITY_PATH] = endpoints.similarity
    for path, endpoint in routes.items():
        router.add_api_route(path, endpoint, methods=["POST"], include_in_schema=False)
    return router
