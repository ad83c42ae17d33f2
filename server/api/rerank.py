"""Rerank and score in the shapes of Cohere, Jina, vLLM, TEI and NIM: by one embedding of each text.

The score is the cosine of the query's and the passage's vectors, each with what the model's family
writes around its side: this model reads no pair at once, as a cross-encoder does, and every answer
says so in a header.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr

from model.tokenizer import Truncation
from server.api import tei
from server.api.body import BodyReader
from server.api.dialect_request import DialectRequest
from server.api.disconnects import patience
from server.api.embedding import CUT_HEADER, Embedding, ranges
from server.api.parsing import parse_inputs
from server.api.request_context import context_of
from server.api.routing import RequestRoute, json_response
from server.api.schemas import InstructedInput
from server.api.vector_format import VectorFormat
from server.api.wire import lower, or_named, truncation
from server.engine.interface import EmbedResult
from server.errors import InvalidRequestError, ServerError
from server.settings import Settings

VOYAGE_PATH, COHERE_PATH = "/v1/rerank", "/v2/rerank"
RERANK_PATHS = ("/rerank", VOYAGE_PATH, COHERE_PATH)
RANKING_PATHS = ("/v1/ranking", "/v1/retrieval/{model_id:path}/reranking")
"""The second is where NVIDIA hosts them, as LiteLLM asks; the model's name there does not count."""
SCORE_PATHS = ("/score", "/v1/score")
PATHS = (*RERANK_PATHS, *RANKING_PATHS, *SCORE_PATHS)
SCORE_HEADER = "x-nv-embed-score"
_NOT_DONE = {
    "rank_fields": "a document is one text: send the texts that count",
    "max_tokens_per_doc": "a document is read up to the model's own limit",
    "max_chunks_per_doc": "a document is one text and has one score",
}
"""Cohere's fields that would change the scores."""


class _Asked(DialectRequest):
    model: StrictStr | None = None
    truncate: Annotated[Truncation | None, or_named("truncation"), BeforeValidator(truncation)] = (
        None
    )
    truncation_side: Annotated[
        Literal["left", "right"] | None, or_named("truncation_direction"), BeforeValidator(lower)
    ] = None
    instruction: StrictStr | None = None
    task: StrictStr | None = None


class RerankRequest(_Asked):
    query: Any
    documents: Annotated[Any, or_named("passages")] = None
    texts: Any = Field(None, description="TEI's name, which asks for its answer, too.")
    top_n: Annotated[StrictInt | None, or_named("top_k")] = Field(None, ge=1)
    return_documents: StrictBool | None = None
    return_text: StrictBool | None = None
    raw_scores: StrictBool | None = Field(None, description="A cosine is one, either way.")

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in _NOT_DONE:
            if name in body:
                raise InvalidRequestError(f"{name}: {_NOT_DONE[name]}", param=name)
        return super()._unfolded(body)


class ScoreRequest(_Asked):
    text_1: Annotated[Any, or_named("queries", "data_1")]
    text_2: Annotated[Any, or_named("documents", "items", "data_2")]


class _Endpoints:
    def __init__(self, embedding: Embedding, settings: Settings) -> None:
        self._embedding = embedding
        self._bodies = BodyReader(settings.max_body_bytes)

    async def rerank(self, request: Request) -> Response:
        """The documents in the order of their cosine to the query."""
        wire, headers = await self._bodies.read(request, RerankRequest)
        if wire.texts is None:
            path = context_of(request.scope).route_path
            name = "passages" if path.endswith(("/ranking", "/reranking")) else "documents"
            return await self._rank(request, wire, headers, wire.documents, name)
        try:
            return await self._rank(request, wire, headers, wire.texts, "texts")
        except ServerError as error:  # the path alone does not tell whose client it is
            return tei.error_response(error)

    async def _rank(
        self,
        request: Request,
        wire: RerankRequest,
        headers: dict[str, str],
        given: Any,
        name: str,
    ) -> Response:
        queries, documents = _texts(wire.query, "query"), _texts(given, name)
        if len(queries) > 1:
            raise InvalidRequestError("query must be one text", param="query")
        vectors, result, said = await self._embed(
            request, wire, queries, documents, ("query", name)
        )
        scores = vectors[1:] @ vectors[0]
        order = np.argsort(-scores, kind="stable")[: wire.top_n].tolist()
        ranked = [(index, float(scores[index])) for index in order]
        path = context_of(request.scope).route_path
        if name == "passages":
            answer: Any = {"rankings": [{"index": i, "logit": score} for i, score in ranked]}
        elif wire.texts is not None:
            answer = [
                {"index": i, "score": score, **({"text": documents[i]} if wire.return_text else {})}
                for i, score in ranked
            ]
        else:
            shows = wire.return_documents
            if shows is None:  # as Jina and vLLM do, and Cohere does not
                shows = path != COHERE_PATH
            answer = {
                "id": f"rerank-{uuid.uuid4()}",
                "model": self._shown(wire),
                "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
                "meta": {"billed_units": {"search_units": 1}},
                "results": [
                    {
                        "index": i,
                        "relevance_score": score,
                        **({"document": {"text": documents[i]}} if shows else {}),
                    }
                    for i, score in ranked
                ],
            }
            if path == VOYAGE_PATH:
                answer["data"] = answer["results"]  # no `object`: Infinity's client knows another
        return _with(json_response(answer), headers | said)

    async def score(self, request: Request) -> Response:
        """The cosine of each pair; one query with each passage where there is one."""
        wire, headers = await self._bodies.read(request, ScoreRequest)
        queries, passages = _texts(wire.text_1, "text_1"), _texts(wire.text_2, "text_2")
        if len(queries) not in (1, len(passages)):
            raise InvalidRequestError(
                f"text_1 has {len(queries)} texts, and text_2 {len(passages)}: one, or as many",
                param="text_1",
            )
        vectors, result, said = await self._embed(
            request, wire, queries, passages, ("text_1", "text_2")
        )
        first, second = np.split(vectors, [len(queries)])
        scores = (np.broadcast_to(first, second.shape) * second).sum(axis=1)
        answer = {
            "id": f"score-{uuid.uuid4()}",
            "object": "list",
            "created": int(time.time()),
            "model": self._shown(wire),
            "data": [
                {"index": index, "object": "score", "score": score}
                for index, score in enumerate(scores.tolist())
            ],
            "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
        }
        return _with(json_response(answer), headers | said)

    def _shown(self, wire: _Asked) -> str:
        return self._embedding.names.shown(wire.model)

    async def _embed(
        self,
        request: Request,
        wire: _Asked,
        queries: Sequence[str],
        passages: Sequence[str],
        names: tuple[str, str],
    ) -> tuple[NDArray[np.float32], EmbedResult, dict[str, str]]:
        """The vectors of both in turn. A refusal names the text by its own field."""
        deadline = time.monotonic() + patience(request)
        fields = InstructedInput.model_construct(
            input="",
            truncate=wire.truncate or (None if names[1] == "texts" else Truncation.END),
            truncation_side=wire.truncation_side if wire.truncate else None,
            instruction=wire.instruction,
            task=wire.task,
        )
        job = self._embedding.pairs_job(fields, queries, passages, wire.model, deadline)
        try:
            result, said = await self._embedding.embed(request, job, VectorFormat())
        except InvalidRequestError as error:
            raise _renamed(error, len(queries), names) from None
        said[SCORE_HEADER] = "cosine"
        if result.cut:
            said[CUT_HEADER] = _cut(result.cut, len(queries), names)
        return np.stack(result.vectors), result, said


def _texts(value: Any, name: str) -> list[str]:
    """Texts, or objects that hold one. Raises InvalidRequestError."""
    inputs = parse_inputs([value] if isinstance(value, dict) else value, name)
    texts = [item for item in inputs if isinstance(item, str)]
    if len(texts) < len(inputs):
        raise InvalidRequestError(f"{name} must be texts", param=name)
    return texts


def _cut(indices: Sequence[int], queries: int, names: tuple[str, str]) -> str:
    """Which were cut, by the fields that they came in."""
    of_queries = [index for index in indices if index < queries]
    of_passages = [index - queries for index in indices if index >= queries]
    parts = []
    if of_queries:
        parts.append("query" if names[0] == "query" else f"{names[0]}[{ranges(of_queries)}]")
    if of_passages:
        parts.append(f"{names[1]}[{ranges(of_passages)}]")
    return ", ".join(parts)


def _renamed(
    error: InvalidRequestError, queries: int, names: tuple[str, str]
) -> InvalidRequestError:
    def own(match: re.Match[str]) -> str:
        index = int(match[1])
        name, place = (names[0], index) if index < queries else (names[1], index - queries)
        return name if name == "query" else f"{name}[{place}]"

    place = re.compile(r"\binput\[(\d+)\]")
    error.message = place.sub(own, error.message)
    error.param = place.sub(own, error.param) if error.param else None
    return error


def _with(response: Response, headers: dict[str, str]) -> Response:
    response.headers.update(headers)
    return response


def create_router(embedding: Embedding, settings: Settings) -> APIRouter:
    router = APIRouter(route_class=RequestRoute)
    endpoints = _Endpoints(embedding, settings)
    for path in (*RERANK_PATHS, *RANKING_PATHS):
        router.add_api_route(path, endpoints.rerank, methods=["POST"], include_in_schema=False)
    for path in SCORE_PATHS:
        router.add_api_route(path, endpoints.score, methods=["POST"], include_in_schema=False)
    return router
