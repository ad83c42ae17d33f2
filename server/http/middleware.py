"""What surrounds every request: its id, log line and metrics outside, its key inside.

Pure ASGI layers, with CORS (if it is on) between the first two, so that refusals and failures carry
its headers, too. The innermost is a short way to the endpoint that most requests want.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Request, Response
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.byte_budget import ByteBudget
from server.engine.engine import EmbeddingEngine
from server.engine.metrics import ROUTES
from server.errors import InternalError, InvalidKeyError, ServerError

logger = logging.getLogger("nv_embed.access")

CLIENT_CLOSED_REQUEST = 499
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health", "/metrics"})
"""No key is needed, and a good answer is not worth a log line: probes and scrapers."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LABELS = {
    "/v1/embeddings": "embeddings",
    "/models": "models",
    "/v1/models": "models",
    "/embeddings": "embeddings",
    "/v1/instructions": "instructions",
    "/livez": "health",
    "/readyz": "health",
    "/health": "health",
    **{f"/{name}": name for name in ("tokenize", "info", "metrics")},
}


def error_response(error: ServerError) -> Response:
    """The one envelope of every error."""
    return Response(
        orjson.dumps(error.body()),
        error.status,
        headers=error.headers(),
        media_type="application/json",
    )


class RequestRecord:
    """Outermost: gives each request its id, its log line and its place in the metrics.

    `scope["log"]` is a dictionary that inner layers add to the log line; on `scope["bytes"]` they
    count what they keep in memory. `scope["headers_by_name"]` is a dictionary, made once because
    each search of the list would take as long; of equal names the last one counts.
    `scope["route_path"]` is the path without the prefix that a proxy may have left in front.
    """

    def __init__(
        self, app: ASGIApp, *, engine: EmbeddingEngine, budget: ByteBudget, access_log: bool
    ) -> None:
        self._app, self._engine, self._access_log = app, engine, access_log
        self._budget = budget
        self._counters: dict[tuple[str, int], Counter] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        scope["headers_by_name"] = header = dict(scope["headers"])
        scope["route_path"] = _route_path(scope)
        request_id = _request_id(header.get(b"x-request-id", b""))
        details: dict[str, Any] = {}
        scope["log"], scope["request_id"] = details, request_id

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self._engine.draining:
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            with self._budget.reservation() as scope["bytes"]:
                await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            self._count(scope["route_path"], status or CLIENT_CLOSED_REQUEST, seconds)
            if self._access_log:
                details = {"ms": round(seconds * 1000, 1), **details, "request_id": request_id}
                _log(scope, status or CLIENT_CLOSED_REQUEST, details)

    def _count(self, path: str, status: int, seconds: float) -> None:
        label = _LABELS.get(path, "other")
        if path.startswith(("/v1/models/", "/models/")):
            label = "models"
        assert label in ROUTES, label
        metrics, key = self._engine.metrics, (label, status)
        if key not in self._counters:  # a look-up by labels takes longer than the count
            self._counters[key] = metrics.requests.labels(label, str(status))
        self._counters[key].inc()
        if label == "embeddings":
            metrics.request_seconds.observe(seconds)
            if status == CLIENT_CLOSED_REQUEST:
                metrics.cancelled.inc()


class Gate:
    """Asks for a key, and answers what nobody foresaw."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[bytes], open_paths: frozenset[str]) -> None:
        self._app, self._open_paths = app, open_paths
        self._keys = [hashlib.sha256(key).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await error_response(refusal)(scope, receive, send)
            return
        answered = False

        async def watched_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            request_id = scope["request_id"]
            logger.exception("a request failed", extra={"request_id": request_id})
            if not answered:
                error = InternalError(f"The server failed; see its log at request {request_id}")
                await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> InvalidKeyError | None:
        if not self._keys or scope["route_path"] in self._open_paths:
            return None
        given = scope["headers_by_name"].get(b"authorization")
        if given is None:
            return InvalidKeyError("You didn't provide an API key: send Authorization: Bearer KEY")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in constant time.
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() == b"bearer" and any(found):
            return None
        return InvalidKeyError("Incorrect API key provided")


class ShortCut:
    """Innermost: takes requests to the endpoints in `endpoints` past the framework's routing,
    dependencies and exit stacks, which cost more than all that the server itself does to answer
    one; everything else goes the usual way. `refusals` answers what an endpoint raises."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        endpoints: Mapping[tuple[str, str], Callable[[Request], Awaitable[Response]]],
        refusals: Mapping[type[Exception], Callable[[Request, Exception], Awaitable[Response]]],
    ) -> None:
        """endpoints: (method, path) -> endpoint."""
        self._app, self._endpoints, self._refusals = app, endpoints, refusals
        self._expected = tuple(refusals)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http":
            endpoint = self._endpoints.get((scope["method"], scope["route_path"]))
        if endpoint is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await endpoint(request)
        except self._expected as error:
            kind = next(kind for kind in self._expected if isinstance(error, kind))
            response = await self._refusals[kind](request, error)
        await response(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """As the framework's router sees it, so that what needs no key is what is then served."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if prefix and path.startswith(f"{prefix}/"):
        return path[len(prefix) :]
    return path


def _request_id(given: bytes) -> str:
    text = given.decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else os.urandom(16).hex()


def _log(scope: Scope, status: int, details: dict[str, Any]) -> None:
    path = scope["path"]
    routine = scope["route_path"] in OPEN_PATHS and status == HTTPStatus.OK
    shown = path[:200].encode("unicode_escape").decode()  # on one line, of a bounded length
    level = logging.DEBUG if routine else logging.INFO
    logger.log(level, "%s %s %d", scope["method"], shown, status, extra=details)
