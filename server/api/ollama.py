"""Ollama's dialect: /api/embed, /api/embeddings, and what its clients ask of a model.

Texts that are too long are cut at their end unless `truncate` is false, as there; times are in
nanoseconds. A model's name may have `:latest` behind it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BeforeValidator, Field, StrictInt, StrictStr

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
from server.api.wire import Wire, truncation
from server.engine.interface import EmbedResult
from server.errors import ServerError
from server.settings import Settings

EMBED_PATHS = ("/api/embed", "/api/embeddings")
FOLDER = "/api/"
"""Of all its routes, and of those that are not here: their errors are shown by its clients."""
_LATEST = ":latest"


class EmbedRequest(DialectRequest):
    model: StrictStr | None = None
    input: Any
    truncate: Annotated[Truncation | None, BeforeValidator(truncation)] = None
    dimensions: StrictInt | None = Field(None, ge=1)


class PromptRequest(DialectRequest):
    model: StrictStr | None = None
    prompt: StrictStr


class ShowRequest(Wire):
    model: StrictStr | None = None
    name: StrictStr | None = None


def _plain(name: str | None) -> str | None:
    return None if name is None else name.removesuffix(_LATEST)


class _Endpoints:
    def __init__(self, embedding: Embedding, settings: Settings) -> None:
        self._embedding, self._names = embedding, embedding.names
        self._started = datetime.now(UTC).isoformat()
        self._bodies, self._answers = BodyReader(settings.max_body_bytes), AnswerWriter()

    async def embed(self, request: Request) -> Response:
        """One or more inputs."""
        arrived = time.monotonic()
        wire, headers = await self._bodies.read(request, EmbedRequest)
        cut = wire.truncate or Truncation.END
        how = VectorFormat(dimensions=wire.dimensions)
        result, said = await self._run(request, wire.input, wire.model, cut, how, arrived)
        shown = self._names.shown(wire.model)
        pieces = _pieces(result, how, shown, time.monotonic() - arrived)
        values = len(result.vectors) * self._embedding.engine.dimensions
        return await self._answers.response(request, pieces, values, headers | said)

    async def embeddings(self, request: Request) -> Response:
        """One prompt: the older form."""
        arrived = time.monotonic()
        wire, headers = await self._bodies.read(request, PromptRequest)
        how, cut = VectorFormat(), Truncation.END
        result, said = await self._run(
            request, wire.prompt, wire.model, cut, how, arrived, "prompt"
        )
        pieces = iter([b'{"embedding":', *how.written(result.vectors[0]), b"}"])
        return await self._answers.response(request, pieces, 1, headers | said)

    async def _run(
        self,
        request: Request,
        inputs: Any,
        model: str | None,
        truncate: Truncation,
        how: VectorFormat,
        arrived: float,
        name: str = "input",
    ) -> tuple[EmbedResult, dict[str, str]]:
        fields = InstructedInput.model_construct(input=inputs, truncate=truncate)
        deadline = arrived + patience(request)
        job = self._embedding.job(request, fields, _plain(model), deadline, name=name)
        return await self._embedding.embed(request, job, how, name)

    def _details(self) -> dict[str, Any]:
        kinds = [runner.dtype for runner in self._embedding.engine.runners]
        family = self._embedding.engine.family.name
        level = kinds[0] if kinds else ""
        return {"format": "safetensors", "family": family, "quantization_level": level}

    async def tags(self, request: Request) -> Response:
        """The model, and its -query and -passage aliases."""
        facts = {"modified_at": self._started, "size": 0, "details": self._details()}
        facts["digest"] = self._embedding.engine.fingerprint
        names = [f"{name}{_LATEST}" for name in self._names.listed()]
        return json_response({"models": [{"name": n, "model": n, **facts} for n in names]})

    async def show(self, request: Request) -> Response:
        """What the model is."""
        wire, headers = await self._bodies.read(request, ShowRequest)
        if (name := _plain(wire.model or wire.name)) is not None:
            self._names.side(name)
        engine = self._embedding.engine
        facts = {
            "general.architecture": engine.family.name,
            f"{engine.family.name}.embedding_length": engine.dimensions,
            f"{engine.family.name}.context_length": engine.limits.max_input_tokens,
        }
        answer = {"details": self._details(), "model_info": facts, "capabilities": ["embedding"]}
        response = json_response({"license": engine.source.license or "", **answer})
        response.headers.update(headers)
        return response

    async def version(self, request: Request) -> Response:
        return json_response({"version": version("nv-embed-server")})


def _pieces(result: EmbedResult, how: VectorFormat, model: str, seconds: float) -> Iterator[bytes]:
    yield b'{"model":%b,"embeddings":' % orjson.dumps(model)
    yield from serialize.rows_pieces(result.vectors, how)
    yield b',"total_duration":%d,"load_duration":0,"prompt_eval_count":%d}' % (
        round(seconds * 1e9),
        result.tokens,
    )


def error_response(error: ServerError) -> Response:
    return error_in({"error": error.message}, error)


def create_router(embedding: Embedding, settings: Settings) -> APIRouter:
    router = APIRouter(route_class=RequestRoute)
    ours = _Endpoints(embedding, settings)
    for path, method, endpoint in (
        ("/api/embed", "POST", ours.embed),
        ("/api/embeddings", "POST", ours.embeddings),
        ("/api/show", "POST", ours.show),
        ("/api/tags", "GET", ours.tags),
        ("/api/version", "GET", ours.version),
    ):
        router.add_api_route(path, endpoint, methods=[method], include_in_schema=False)
    return router
