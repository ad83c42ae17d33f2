"""What comes of an error: the answer to what is raised within, foreseen or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus

from fastapi import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.hints import nearest
from server.api.openai_errors import error_response
from server.api.request_context import context_of
from server.errors import (
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    ServerError,
)
from server.http.request_record import CLIENT_CLOSED_REQUEST
from server.logs import details

ErrorShape = Callable[[ServerError], Response]
logger = logging.getLogger("nv_embed.access")


class Refusals:
    """ASGI layer; `paths` are those of the routes, for who asks for another one; `shapes` how an
    error is written for a path, where it is not as OpenAI does."""

    def __init__(
        self, app: ASGIApp, *, paths: frozenset[str], shapes: Mapping[str, ErrorShape]
    ) -> None:
        self._app, self._paths, self._shapes = app, paths, shapes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answered = False

        async def watched_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception as error:
            foreseen = self._foreseen(scope, error)
            if foreseen is None or (answered and not isinstance(error, ClientDisconnect)):
                context = context_of(scope)
                request_id, said = context.request_id, {"request_id": context.request_id}
                if "trace_id" in context.log:
                    said["trace_id"] = context.log["trace_id"]
                logger.exception("a request failed", extra=details(said))
                failed = f"The server failed; see its log at request {request_id}"
                foreseen = self._written(scope, InternalError(failed))
            if not answered:
                await foreseen(scope, receive, send)

    def _foreseen(self, scope: Scope, error: Exception) -> Response | None:
        if isinstance(error, ServerError):
            return self._written(scope, error)
        if isinstance(error, HTTPException):
            return self._of_framework(scope, error)
        if isinstance(error, ClientDisconnect):
            return Response(status_code=CLIENT_CLOSED_REQUEST)  # for nobody
        return None

    def _of_framework(self, scope: Scope, error: HTTPException) -> Response:
        """What the framework itself refuses, in our envelope."""
        method, path = scope["method"], scope["path"][:200]
        is_base = context_of(scope).route_path == "/"  # which a browser opens
        if error.status_code == HTTPStatus.NOT_FOUND or is_base:
            words = f"Unknown route {method} {path}{self._pointer(context_of(scope).route_path)}"
            refusal = NotFoundError(words)
            return error_response(refusal) if is_base else self._written(scope, refusal)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers = dict(error.headers or {})
            use = f": use {headers['Allow']}" if "Allow" in headers else ""
            wrong = MethodNotAllowedError(f"{path} does not take {method}{use}")
            answer = self._written(scope, wrong)
            answer.headers.update(headers)
            return answer
        return self._written(scope, InvalidRequestError(f"{error.detail}"))

    def _written(self, scope: Scope, error: ServerError) -> Response:
        path = context_of(scope).route_path
        folder = f"/{path[1:].partition('/')[0]}/"
        shape = self._shapes.get(path) or self._shapes.get(folder, error_response)
        return shape(error)

    def _pointer(self, path: str) -> str:
        """What somebody who asked for an unknown route may have wanted."""
        # A base URL that ends with a slash or with /v1, where the client puts its own.
        parts = [part for part in path[:100].split("/") if part]
        once = [part for index, part in enumerate(parts) if index == 0 or part != parts[index - 1]]
        if once in ([], ["v1"]):  # a base URL by itself
            docs = ", /docs" if "/docs" in self._paths else ""
            return f": texts are embedded by POST /v1/embeddings; see also /v1/models, /info{docs}"
        close = nearest("/" + "/".join(once), self._paths)
        why = ""
        if len(once) < len(parts) and "v1" in parts:
            why = " It has /v1 twice: the client puts one behind its base URL."
        return f": did you mean {close}?{why}" if close else ""
