"""The HTTP endpoints: bytes to wire types, wire types to the engine, answers to bytes.

Owns how much work is done between two turns of the event loop: large bodies are read on a thread,
large answers are written piece by piece.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from model.tasks import TASKS
from server.api import instructions, json_fields, schemas, serialize
from server.api.byte_budget import ByteBudgetError
from server.api.hints import ignored_names
from server.api.names import ServedNames
from server.engine.engine import EmbeddingEngine
from server.engine.inputs import Tokenization, tokenization_of
from server.errors import (
    BodyTooLargeError,
    OverloadedError,
    UnavailableError,
    UnsupportedMediaTypeError,
)
from server.settings import MAX_REQUEST_INPUTS, MAX_REQUEST_TOKENS, Settings

IGNORED_HEADER = "x-ignored-fields"
"""Names the fields of a body that nobody knows; most of them are a misspelt one."""
EMBEDDINGS_PATHS = ("/v1/embeddings", "/embeddings")
DEADLINE_HEADERS = (b"x-stainless-read-timeout", b"x-stainless-timeout")
"""Seconds after which the SDK gives up: OpenAI's Python and Node SDKs."""

_SHORT_ANSWER = serialize.PIECE_VALUES
"""Values of an answer that is written at once."""
_WHOLE_ANSWER = 256 * 1024
"""Values of an answer that is sent at once, with its length in front: larger ones are sent as they
are written, and never in memory as a whole."""
_BASE64_BYTES = 4 + 6  # of one value: in memory, and in the answer
_FLOAT_BYTES = 4 + 13
_ID_BYTES = 4 + 6
_DISCARD_FACTOR = 4
"""Bodies up to so many times the limit are read to their end and dropped before the 413: a client
that is still sending would see a broken connection instead."""

_JSON = "application/json"

_Responses = dict[int | str, dict[str, Any]]
_ERRORS: _Responses = {
    status: {"model": schemas.ErrorResponse, "description": text}
    for status, text in {
        400: "The request is malformed, or an input is too long; `param` names the field.",
        401: "No or a wrong API key.",
        404: "Unknown model or route.",
        405: "Wrong method.",
        408: "The request did not arrive in time.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        429: "The queue is full; `Retry-After` says when to come back.",
        431: "The headers are too large.",
        500: "The server failed; the message holds the request id.",
        503: "No worker is ready, or the server is shutting down; see `Retry-After`.",
        504: "The client's deadline passed before its inputs ran.",
    }.items()
}
_READ_ERRORS: _Responses = {status: _ERRORS[status] for status in (401, 405, 408, 431, 500)}


class ClientGoneError(Exception):
    """The client closed its connection before the answer."""


def create_router(engine: EmbeddingEngine, settings: Settings) -> APIRouter:
    """All endpoints over one engine."""
    router = APIRouter()
    names = ServedNames(engine.source.model_id, settings.served_model_name)
    defaults = instructions.Defaults.of(settings.query_instruction, settings.default_input_type)
    created = int(time.time())

    # One thread, so that large bodies that are read compete with the event loop once, not twice.
    reader = ThreadPoolExecutor(1, thread_name_prefix="read")
    turn = asyncio.Lock()  # one piece of one large answer is written between two turns of the loop

    async def read(request: Request, wire: type[schemas.W]) -> tuple[schemas.W, dict[str, str]]:
        """-> (the body, headers for its answer)."""
        body = await _read_body(request, settings.max_body_bytes)
        if len(body) <= json_fields.STEP:
            fields, unknown = schemas.read_body(wire, body)
        else:
            work = partial(schemas.read_body, wire, body)
            with _cancelled_on_disconnect(request):
                fields, unknown = await asyncio.get_running_loop().run_in_executor(reader, work)
        if not unknown:
            return fields, {}
        request.scope["log"]["ignored_fields"] = len(unknown)
        return fields, {IGNORED_HEADER: ignored_names(unknown, schemas.known_fields(wire))}

    async def written(
        request: Request, pieces: Iterator[bytes], values: int, headers: dict[str, str]
    ) -> Response:
        if values <= _SHORT_ANSWER:
            return _DrainedResponse(b"".join(pieces), headers=headers, media_type=_JSON)
        paced = _paced(pieces, turn)
        if values <= _WHOLE_ANSWER or request.scope["http_version"] == "1.0":  # has no pieces
            whole = b"".join([piece async for piece in paced])
            return _DrainedResponse(whole, headers=headers, media_type=_JSON)
        return _AnswerInPieces(paced, headers)

    def tokenization(wire: schemas.InstructedInput, model: str | None) -> Tokenization:
        return tokenization_of(wire, model, names, defaults)

    async def create_embeddings(request: Request) -> Response:
        """Embed one or more inputs: OpenAI's endpoint, with optional fields for instructions."""
        arrived = time.monotonic()
        wire, headers = await read(request, schemas.EmbeddingsRequest)
        how = tokenization(wire, wire.model)
        inputs = schemas.parse_inputs(wire.input)
        serialize.check_dimensions(
            wire.dimensions, engine.config.hidden_size, settings.allow_truncated_dimensions
        )
        as_base64 = wire.encoding_format == "base64"
        values = len(inputs) * engine.config.hidden_size
        _hold(request, values * (_BASE64_BYTES if as_base64 else _FLOAT_BYTES))
        with _cancelled_on_disconnect(request):
            vectors, tokens = await engine.embed(inputs, how, deadline=arrived + _patience(request))
        request.scope["log"].update(inputs=len(inputs), tokens=tokens)
        pieces = serialize.embeddings_pieces(
            vectors,
            model=wire.model,
            tokens=tokens,
            base64=as_base64,
            dimensions=wire.dimensions,
        )
        return await written(request, pieces, values, headers)

    for path in EMBEDDINGS_PATHS:
        router.add_api_route(
            path,
            create_embeddings,
            methods=["POST"],
            tags=["embeddings"],
            include_in_schema=path == "/v1/embeddings",
            operation_id="create_embeddings" if path == "/v1/embeddings" else None,
            openapi_extra=_body_schema("EmbeddingsRequest"),
            responses={200: {"model": schemas.EmbeddingsResponse}, **_ERRORS},
        )

    @router.post(
        "/tokenize",
        tags=["embeddings"],
        operation_id="tokenize",
        openapi_extra=_body_schema("TokenizeRequest"),
        responses={
            200: {"model": schemas.TokenizeResponse},
            **{status: _ERRORS[status] for status in _ERRORS if status != 504},
        },
    )
    async def tokenize(request: Request) -> Response:
        """The ids that would run for the same inputs and fields, and what the prefix adds."""
        wire, headers = await read(request, schemas.TokenizeRequest)
        how = tokenization(wire, wire.model)
        inputs = schemas.parse_inputs(wire.input)
        with _cancelled_on_disconnect(request):
            encodings = await engine.tokenize(inputs, how)
        tokens = sum(map(len, encodings))
        request.scope["log"].update(inputs=len(inputs), tokens=tokens)
        _hold(request, tokens * _ID_BYTES)
        pieces = serialize.tokens_pieces(encodings, how.prefix or "", engine.max_input_tokens)
        return await written(request, pieces, tokens, headers)

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "nv-embed-server"}

    @router.get("/models", include_in_schema=False)
    @router.get(
        "/v1/models",
        tags=["models"],
        operation_id="list_models",
        responses={200: {"model": schemas.ModelList}, **_READ_ERRORS},
    )
    async def list_models() -> Response:
        """The model, and its -query and -passage aliases."""
        return _json({"object": "list", "data": [card(name) for name in names.listed()]})

    @router.get("/models/{model_id:path}", include_in_schema=False)
    @router.get(
        "/v1/models/{model_id:path}",
        tags=["models"],
        operation_id="retrieve_model",
        responses={200: {"model": schemas.ModelCard}, **_READ_ERRORS, 404: _ERRORS[404]},
    )
    async def retrieve_model(model_id: str) -> Response:
        """One model by its id or alias."""
        names.side(model_id)
        return _json(card(model_id))

    @router.get(
        "/v1/instructions",
        tags=["models"],
        operation_id="list_instructions",
        responses={200: {"model": schemas.InstructionList}, **_READ_ERRORS},
    )
    async def list_instructions() -> Response:
        """The named tasks, and what the server does when a request does not say."""
        data = [
            {"task": name, "query": task.query, "passage": task.passage, "source": task.source}
            for name, task in TASKS.items()
        ]
        return _json(
            {
                "object": "list",
                "data": data,
                "query_instruction": defaults.query_instruction,
                "default_input_type": defaults.input_type or "none",
            }
        )

    @router.get(
        "/info",
        tags=["server"],
        operation_id="info",
        responses={200: {"model": schemas.Info}, **_READ_ERRORS},
    )
    async def info() -> Response:
        """What runs here: model, licence, devices, limits, version."""
        return _json(
            {
                "version": version("nv-embed-server"),
                "model": names.names[0],
                "revision": engine.source.revision,
                "license": engine.source.license,
                "dimensions": engine.config.hidden_size,
                "devices": [
                    {
                        "device": runner.device,
                        "device_name": runner.device_name,
                        "dtype": runner.dtype,
                        "quantization": runner.quantization,
                        "attention": runner.attention,
                        "cuda_graphs": runner.cuda_graphs,
                        "products": runner.products,
                    }
                    for runner in engine.runners
                ],
                "limits": {
                    "max_input_tokens": engine.max_input_tokens,
                    "max_request_inputs": MAX_REQUEST_INPUTS,
                    "max_request_tokens": MAX_REQUEST_TOKENS,
                    "max_batch_tokens": [o.max_batch_tokens for o in engine.worker_options],
                    "max_batch_seqs": settings.max_batch_seqs,
                    "max_queued_tokens": engine.max_queued_tokens,
                    "max_body_bytes": settings.max_body_bytes,
                },
            }
        )

    @router.get(
        "/livez",
        tags=["server"],
        operation_id="livez",
        responses={200: {"model": schemas.Health}, **_READ_ERRORS},
    )
    async def livez() -> Response:
        """The process answers."""
        return _json({"status": "ok"})

    async def readyz() -> Response:
        """Ready to serve: a worker is up, and the server is not shutting down."""
        if reason := engine.not_ready:
            raise UnavailableError(f"not ready: {reason}", retry_after=2)
        return _json({"status": "ok"})

    for path in ("/readyz", "/health"):
        router.add_api_route(
            path,
            readyz,
            methods=["GET"],
            tags=["server"],
            operation_id=path.strip("/"),
            responses={200: {"model": schemas.Health}, **_READ_ERRORS, 503: _ERRORS[503]},
        )

    @router.get(
        "/metrics",
        tags=["server"],
        operation_id="metrics",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
            **_READ_ERRORS,
        },
    )
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _body_schema(name: str) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{name}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type=_JSON)


async def _read_body(request: Request, limit: int) -> bytes | bytearray:
    """The whole body. Raises UnsupportedMediaTypeError or BodyTooLargeError."""
    header = request.scope["headers_by_name"]
    _check_media_type(header.get(b"content-type", b"application/json"))
    coding = header.get(b"content-encoding", b"").strip().lower()
    if coding not in (b"", b"identity"):
        raise UnsupportedMediaTypeError(
            f"The body came with Content-Encoding: {_shown(coding)}, which this server does not "
            "decode: send it as it is, without that header"
        )
    too_large = BodyTooLargeError(f"The body is larger than {limit} bytes: send fewer inputs")
    length = header.get(b"content-length", b"0")
    if length.isdigit() and int(length) > _DISCARD_FACTOR * limit:
        raise too_large
    body: bytes | bytearray = b""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            _hold(request, len(part))
            if not body:
                body = part
            elif part:
                body = bytearray(body) if isinstance(body, bytes) else body
                body += part
        elif size > _DISCARD_FACTOR * limit:
            raise too_large
        else:
            body = b""
    if size > limit:
        raise too_large
    return body


def _check_media_type(given: bytes) -> None:
    media_type = given.partition(b";")[0].strip().lower()
    if media_type == b"application/json" or media_type.endswith(b"+json"):
        return
    came = f", and it came as {_shown(given)}" if given else ""
    raise UnsupportedMediaTypeError(
        f"The body must be JSON{came}: send the header Content-Type: application/json"
    )


def _shown(value: bytes) -> str:
    """A header's value in a message."""
    return ascii(value[:100].decode("latin-1"))


def _hold(request: Request, size: int) -> None:
    """Count bytes that this request keeps in memory until it is answered."""
    try:
        request.scope["bytes"].add(size)
    except ByteBudgetError:
        raise OverloadedError(
            "too many bytes of requests and answers are in flight", retry_after=1
        ) from None


class _DrainedResponse(Response):
    """Ends only when the client has taken most of it: uvicorn waits before the second send. What
    is below its high-water mark it does not wait for."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        large = len(self.body) > HIGH_WATER_LIMIT
        await send({"type": "http.response.body", "body": self.body, "more_body": large})
        if large:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _AnswerInPieces(Response):
    """Sends each piece when it is made, waiting while the client is slow to read; ends early when
    the client has gone."""

    def __init__(self, pieces: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(headers=headers, media_type=_JSON)
        del self.headers["content-length"]  # nobody knows it yet
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone: asyncio.Future[None] | None = scope.get("disconnected")
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            if gone is not None and gone.done():
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _paced(pieces: Iterator[bytes], turn: asyncio.Lock) -> AsyncIterator[bytes]:
    """Each piece is made in a turn of the event loop in which no other such piece is made."""
    while True:
        async with turn:
            piece = next(pieces, None)
            await asyncio.sleep(0)
        if piece is None:
            return
        yield piece


def _patience(request: Request) -> float:
    """Seconds that the client waits for its answer, by the SDKs' headers; else for ever."""
    for name in DEADLINE_HEADERS:
        given = request.scope["headers_by_name"].get(name)
        if given is None:
            continue
        try:
            seconds = float(given)
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return math.inf


@contextmanager
def _cancelled_on_disconnect(request: Request) -> Iterator[None]:
    """Cancel the block when the client goes away, and raise ClientGoneError in its place.

    Only `server.http.connection` tells of that; under another HTTP server the block runs to its end.
    """
    task = asyncio.current_task()
    assert task is not None
    disconnected: asyncio.Future[None] | None = request.scope.get("disconnected")
    inside, gone = True, False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal gone
        if inside:  # the block may have ended since this was scheduled
            gone = True
            task.cancel()

    if disconnected is not None:
        disconnected.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if gone and not task.uncancel():
            raise ClientGoneError from None
        raise
    finally:
        inside = False
        if disconnected is not None:
            disconnected.remove_done_callback(leave)
