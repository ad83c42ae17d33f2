"""OpenAI's dialect: /v1/embeddings, /v1/models, and what this server adds to it.

A body becomes an EmbedJob, an EmbedResult becomes the answer. Knows no queue and no worker.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from model.prompts import written
from model.tasks import TASKS
from server.api import answer_schemas, schemas, serialize
from server.api.answers import AnswerWriter
from server.api.body import BodyReader, hold
from server.api.disconnects import cancelled_on_disconnect, patience
from server.api.embedding import SIDE_HEADER, Embedding, salt_of, side_of
from server.api.encoding_options import vector_format
from server.api.request_context import context_of
from server.api.routing import ERRORS, READ_ERRORS, RequestRoute, body_schema, json_response
from server.settings import Settings

AZURE_PATHS = ("/openai/v1/embeddings", "/openai/deployments/{model_id:path}/embeddings")
"""Where Azure's clients send the same; a deployment's name is that of a model."""
_ID_BYTES = 4 + 6  # in memory, and in the answer


class _Endpoints:
    """The endpoints over one engine."""

    def __init__(self, embedding: Embedding, settings: Settings) -> None:
        self._embedding, self._engine = embedding, embedding.engine
        self._names, self._defaults = embedding.names, embedding.defaults
        self._created = int(time.time())
        self._bodies, self._answers = BodyReader(settings.max_body_bytes), AnswerWriter()

    async def create_embeddings(self, request: Request) -> Response:
        """Embed one or more inputs: OpenAI's endpoint, with optional fields for instructions."""
        arrived = time.monotonic()
        wire, headers = await self._bodies.read(request, schemas.EmbeddingsRequest)
        if (deployment := request.path_params.get("model_id")) is not None:
            wire.model = deployment
        job = self._embedding.job(request, wire, wire.model, arrived + patience(request))
        if wire.cache_salt is not None or wire.priority is not None:
            job = job._replace(priority=wire.priority or 0, salt=salt_of(wire.cache_salt))
        how = vector_format(wire)
        result, said = await self._embedding.embed(request, job, how)
        values = len(result.vectors) * self._engine.dimensions
        pieces = serialize.embeddings_pieces(
            result.vectors,
            model=self._names.shown(wire.model),
            tokens=result.tokens,
            how=how,
            spans=result.spans,
        )
        return await self._answers.response(request, pieces, values, headers | said)

    async def tokenize(self, request: Request) -> Response:
        """The ids that would run for the same inputs and fields, and what the prefix adds."""
        wire, headers = await self._bodies.read(request, schemas.TokenizeRequest)
        job = self._embedding.job(request, wire, wire.model)
        began = time.monotonic()
        with cancelled_on_disconnect(request):
            encodings = await self._engine.tokenize(job)
        if (times := context_of(request.scope).times) is not None:
            times.add((time.monotonic() - began,))
        tokens = sum(map(len, encodings))
        context_of(request.scope).log.update(inputs=len(job.inputs), tokens=tokens)
        hold(request, tokens * _ID_BYTES)
        limit = self._engine.limits.max_input_tokens
        pieces = serialize.tokens_pieces(encodings, job.options.prompt, limit)
        headers[SIDE_HEADER] = side_of(job)
        return await self._answers.response(request, pieces, tokens, headers)

    def _card(self, name: str) -> dict[str, Any]:
        facts = {"object": "model", "created": self._created, "owned_by": "nv-embed-server"}
        return {"id": name, **facts}

    async def list_models(self, request: Request) -> Response:
        """The model, and its -query and -passage aliases."""
        cards = [self._card(name) for name in self._names.listed()]
        return json_response({"object": "list", "data": cards})

    async def retrieve_model(self, request: Request) -> Response:
        """One model by its id or alias."""
        model_id: str = request.path_params["model_id"]
        self._names.side(model_id)
        return json_response(self._card(model_id))

    async def list_instructions(self, request: Request) -> Response:
        """The named tasks, and what the server does when a request does not say."""
        data = [
            {"task": name, "query": task.query, "passage": task.passage, "source": task.source}
            for name, task in TASKS.items()
        ]
        family = self._defaults.family
        own = {side: written(self._defaults.prompt(side).prefix) for side in ("query", "passage")}
        defaults = {
            "family": family.name,
            "template": family.template,
            "prompts": {**self._defaults.prompts, **own},
            "query_instruction": self._defaults.query_instruction,
            "default_input_type": self._defaults.input_type or "none",
        }
        return json_response({"object": "list", "data": data, **defaults})


def create_router(embedding: Embedding, settings: Settings) -> APIRouter:
    """The dialect's routes."""
    router = APIRouter(route_class=RequestRoute)
    endpoints = _Endpoints(embedding, settings)
    for path in (*schemas.EMBEDDINGS_PATHS, *AZURE_PATHS):
        documented = path == schemas.EMBEDDINGS_PATHS[0]
        router.add_api_route(
            path,
            endpoints.create_embeddings,
            methods=["POST"],
            tags=["embeddings"],
            include_in_schema=documented,
            operation_id="create_embeddings" if documented else None,
            openapi_extra=body_schema("EmbeddingsRequest"),
            responses={200: {"model": answer_schemas.EmbeddingsResponse}, **ERRORS},
        )
    router.add_api_route(
        "/tokenize",
        endpoints.tokenize,
        methods=["POST"],
        tags=["embeddings"],
        operation_id="tokenize",
        openapi_extra=body_schema("TokenizeRequest"),
        responses={
            200: {"model": answer_schemas.TokenizeResponse},
            **{status: ERRORS[status] for status in ERRORS if status not in (409, 504)},
        },
    )
    for prefix in ("/v1", ""):
        documented = prefix == "/v1"
        router.add_api_route(
            f"{prefix}/models",
            endpoints.list_models,
            methods=["GET"],
            tags=["models"],
            include_in_schema=documented,
            operation_id="list_models" if documented else None,
            responses={200: {"model": answer_schemas.ModelList}, **READ_ERRORS},
        )
        router.add_api_route(
            f"{prefix}/models/{{model_id:path}}",
            endpoints.retrieve_model,
            methods=["GET"],
            tags=["models"],
            include_in_schema=documented,
            operation_id="retrieve_model" if documented else None,
            openapi_extra={"parameters": [_MODEL_ID]},
            responses={200: {"model": answer_schemas.ModelCard}, **READ_ERRORS, 404: ERRORS[404]},
        )
    router.add_api_route(
        "/v1/instructions",
        endpoints.list_instructions,
        methods=["GET"],
        tags=["models"],
        operation_id="list_instructions",
        responses={200: {"model": answer_schemas.InstructionList}, **READ_ERRORS},
    )
    return router


_MODEL_ID = {
    "name": "model_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "title": "Model Id"},
}
