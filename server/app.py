"""create_app(settings, engine): wiring only. Also what surrounds every request: its id, its key,
its log line, its metrics, and the one envelope of every error.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.hub import ModelSource
from server import schemas
from server.engine import EmbeddingEngine
from server.errors import (
    InternalError,
    InvalidKeyError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServerError,
)
from server.metrics import ROUTES
from server.routes import ClientGoneError, create_router
from server.settings import Settings

logger = logging.getLogger("nv_embed.access")

TITLE = "NV-Embed server"
SUMMARY = "OpenAI-compatible embeddings from NV-Embed."
CLIENT_CLOSED_REQUEST = 499
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""No key is needed: probes and scrapers have none."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LABELS = {
    "/v1/embeddings": "embeddings",
    "/embeddings": "embeddings",
    "/v1/instructions": "instructions",
    "/livez": "health",
    "/readyz": "health",
    "/health": "health",
    **{f"/{name}": name for name in ("tokenize", "info", "metrics")},
}


def create_app(settings: Settings, engine: EmbeddingEngine) -> FastAPI:
    """The ASGI application over an engine, which the caller starts and stops."""
    app = FastAPI(title=TITLE, summary=SUMMARY, root_path=settings.root_path)
    app.include_router(create_router(engine, settings))
    app.add_exception_handler(ServerError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestEnvelope, engine=engine, settings=settings)
    app.openapi = openapi_document  # type: ignore[method-assign]
    return app


class RequestEnvelope:
    """Outermost middleware: request id, API key, access log, metrics, unforeseen errors."""

    def __init__(self, app: ASGIApp, *, engine: EmbeddingEngine, settings: Settings) -> None:
        self._app, self._engine = app, engine
        self._keys = [hashlib.sha256(key).digest() for key in settings.api_keys()]
        self._allow_preflight = bool(settings.cors_origin)
        self._log = settings.access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))
        details: dict[str, Any] = {}
        scope["log"] = details
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                ]
                if self._engine.draining:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            if self._may_pass(scope, headers):
                await self._app(scope, receive, send_with_id)
            else:
                answer = _error_response(_wrong_key(headers))
                await answer(scope, receive, send_with_id)
        except Exception:
            logger.exception("a request failed", extra={"request_id": request_id})
            if not status:
                error = InternalError(f"The server failed; see its log at request {request_id}")
                await _error_response(error)(scope, receive, send_with_id)
        finally:
            self._record(scope, request_id, status, time.monotonic() - started, details)

    def _may_pass(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return True
        if self._allow_preflight and scope["method"] == "OPTIONS":
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in constant time.
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)

    def _record(
        self, scope: Scope, request_id: str, status: int, seconds: float, details: dict[str, Any]
    ) -> None:
        path = scope["path"]
        label = "models" if path.startswith("/v1/models") else _LABELS.get(path, "other")
        assert label in ROUTES, label
        status = status or CLIENT_CLOSED_REQUEST
        metrics = self._engine.metrics
        metrics.requests.labels(label, str(status)).inc()
        if label == "embeddings":
            metrics.request_seconds.observe(seconds)
            if status == CLIENT_CLOSED_REQUEST:
                metrics.cancelled.inc()
        if self._log:
            # Probes and scrapers come every few seconds.
            is_routine = path in OPEN_PATHS and status == HTTPStatus.OK
            logger.log(
                logging.DEBUG if is_routine else logging.INFO,
                "%s %s %d",
                scope["method"],
                _loggable(path),
                status,
                extra={"ms": round(seconds * 1000, 1), **details, "request_id": request_id},
            )


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def _loggable(path: str) -> str:
    """A path on one line, of a bounded length."""
    return path[:200].encode("unicode_escape").decode()


def _wrong_key(headers: dict[bytes, bytes]) -> InvalidKeyError:
    if b"authorization" not in headers:
        return InvalidKeyError("You didn't provide an API key: send Authorization: Bearer KEY")
    return InvalidKeyError("Incorrect API key provided")


def _error_response(error: ServerError) -> Response:
    return Response(
        orjson.dumps(error.body()),
        error.status,
        headers=error.headers(),
        media_type="application/json",
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError), error
    return _error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the framework itself refuses, in our envelope."""
    assert isinstance(error, HTTPException), error
    method, path = request.method, request.url.path
    if error.status_code == HTTPStatus.NOT_FOUND:
        return _error_response(NotFoundError(f"Unknown route {method} {path}"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        answer = _error_response(MethodNotAllowedError(f"{path} does not take {method}"))
        answer.headers.update(error.headers or {})
        return answer
    return _error_response(InvalidRequestError(f"{error.detail}"))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def openapi_document() -> dict[str, Any]:
    """The OpenAPI document, which depends on no model and no setting."""
    no_engine = SimpleNamespace(source=ModelSource("nv-embed", Path(), None, None))
    app = FastAPI()
    app.include_router(create_router(cast(EmbeddingEngine, no_engine), Settings()))
    document = get_openapi(
        title=TITLE, version=version("nv-embed-server"), summary=SUMMARY, routes=app.routes
    )
    components = document["components"]
    # The bodies that the routes read themselves, and nothing of FastAPI's own validation.
    for wire in (schemas.EmbeddingsRequest, schemas.TokenizeRequest):
        components["schemas"][wire.__name__] = wire.model_json_schema()
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "Needed when the server was started with --api-key.",
        }
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}, {}]
    return document
