"""The outermost layer: gives each request its id, its log line and its place in the metrics."""

from __future__ import annotations

import logging
import random
import re
import time
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.families import Side
from server.api import cohere, ollama, openai, rerank, tei
from server.api.byte_budget import ByteBudget
from server.api.openapi import METRICS_PATHS, OPEN_PATHS
from server.api.request_context import RequestContext, put_context
from server.api.schemas import EMBEDDINGS_PATHS
from server.engine.interface import Engine
from server.engine.metrics import ROUTES, Metrics
from server.engine.tallies import Count
from server.logs import details

logger = logging.getLogger("nv_embed.access")

_FIRST_ERROR = 400
CLIENT_CLOSED_REQUEST = 499
_ids = random.Random()  # noqa: S311  (no secrets, only unlike each other; the system takes 10 us)
_SIDES: dict[str, Side] = {"query": "query", "passage": "passage"}
"""By the first folder of a path."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
LABELS = {
    **dict.fromkeys(
        (*EMBEDDINGS_PATHS, *openai.AZURE_PATHS, *cohere.PATHS, *tei.EMBED_PATHS), "embeddings"
    ),
    **dict.fromkeys(ollama.EMBED_PATHS, "embeddings"),
    **dict.fromkeys((*rerank.PATHS, tei.SIMILARITY_PATH), "rerank"),
    "/models": "models",
    "/v1/models": "models",
    "/v1/instructions": "instructions",
    **dict.fromkeys(OPEN_PATHS - METRICS_PATHS, "health"),
    **dict.fromkeys(METRICS_PATHS, "metrics"),
    **{f"/{name}": name for name in ("tokenize", "info")},
}
_LABELS_BEFORE = {
    "/v1/models/": "models",
    "/models/": "models",
    "/openai/deployments/": "embeddings",
    "/v1/retrieval/": "rerank",
}
assert {"other", *LABELS.values(), *_LABELS_BEFORE.values()} <= set(ROUTES)


class RequestRecord:
    """ASGI layer; makes the RequestContext that all within it use."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        engine: Engine,
        metrics: Metrics,
        budget: ByteBudget,
        access_log: bool,
    ) -> None:
        self._app, self._engine, self._metrics = app, engine, metrics
        self._budget, self._access_log = budget, access_log
        self._counters: dict[tuple[str, int], Count] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":  # the HTTP server sends the head of what is written
            scope = {**scope, "method": "GET"}
        started, status = time.monotonic(), 0
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(b"x-request-id", b""))

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                if self._engine.draining:
                    added.append((b"connection", b"close"))
                message["headers"] = added
            await send(message)

        path, side = _side_of(scope)
        with self._budget.reservation() as memory:
            context = RequestContext(request_id, headers, path, memory, side)
            put_context(scope, context)
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                seconds = time.monotonic() - started
                self._count(context.route_path, status or CLIENT_CLOSED_REQUEST, seconds)
                if context.serialize_seconds:
                    self._metrics.serialize_seconds.observe(context.serialize_seconds)
                if self._access_log:
                    said = {"ms": round(seconds * 1000, 1), **context.log}
                    said["request_id"] = request_id
                    _log(scope, context.route_path, status or CLIENT_CLOSED_REQUEST, said)

    def _count(self, path: str, status: int, seconds: float) -> None:
        label = LABELS.get(path) or _label(path)
        metrics, key = self._metrics, (label, status)
        if key not in self._counters:  # a look-up by labels takes longer than the count
            self._counters[key] = metrics.requests.labels(label, str(status))
        self._counters[key].inc()
        if label == "embeddings":
            if status < _FIRST_ERROR:  # a refusal takes no time, and would show overload as speed
                metrics.request_seconds.observe(seconds)
            elif status == CLIENT_CLOSED_REQUEST:
                metrics.cancelled.inc()


def _label(path: str) -> str:
    """Of a path that holds a name."""
    for before, label in _LABELS_BEFORE.items():
        if path.startswith(before):
            return label
    return "other"


def _route_path(scope: Scope) -> str:
    """As the framework's router sees it, so that what needs no key is what is then served."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if prefix and path.startswith(f"{prefix}/"):
        return path[len(prefix) :]
    return path


def _side_of(scope: Scope) -> tuple[str, Side | None]:
    """The route's path, and the side in front of it, which the scope's path loses (and a slash
    behind): a base URL is what every client lets its user set."""
    path = _route_path(scope)
    if path.endswith("/") and path != "/":  # a base URL with one behind
        bare = path.rstrip("/") or "/"
        scope["path"] = scope["path"][: len(scope["path"]) - len(path)] + bare
        path = bare
    side = _SIDES.get(path[1:].partition("/")[0])
    if side is None:
        return path, None
    before = len(scope["path"]) - len(path)
    rest = path[len(side) + 1 :] or "/"  # Hugging Face's clients post to the URL itself
    scope["path"] = scope["path"][:before] + rest
    return rest, side


def _request_id(given: bytes) -> str:
    if given and _REQUEST_ID.fullmatch(text := given.decode("latin-1")):
        return text
    return f"{_ids.getrandbits(128):032x}"


def _log(scope: Scope, route_path: str, status: int, said: dict[str, Any]) -> None:
    path = scope["path"]
    routine = route_path in OPEN_PATHS and status == HTTPStatus.OK
    shown = path
    if path not in LABELS:  # on one line, of a bounded length
        shown = path[:200].encode("unicode_escape").decode()
    level = logging.DEBUG if routine else logging.INFO
    logger.log(level, "%s %s %d", scope["method"], shown, status, extra=details(said))
