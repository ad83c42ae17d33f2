"""How this server's endpoints hang in FastAPI: they take the request as it is.

Nothing of FastAPI's own validation runs: bodies are read within limits of our own, and what the
OpenAPI document says of them is said here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from server.api import answer_schemas
from server.api.request_context import context_of

Endpoint = Callable[[Request], Awaitable[Response]]
Responses = dict[int | str, dict[str, Any]]
ERRORS: Responses = {
    status: {"model": answer_schemas.ErrorResponse, "description": text}
    for status, text in {
        400: "The request is malformed, or an input is too long; `param` names the field.",
        401: "No or a wrong API key.",
        404: "Unknown model or route.",
        405: "Wrong method.",
        408: "The request did not arrive in time.",
        409: "These are other vectors than x-nv-embed-fingerprint asks for.",
        413: "The body is too large.",
        415: "The body is not application/json.",
        429: "The queue is full; `Retry-After` says when to come back.",
        431: "The headers are too large.",
        500: "The server failed; the message holds the request id.",
        503: "No worker is ready, or the server is shutting down; see `Retry-After`.",
        504: "The client's deadline passed before its inputs ran.",
    }.items()
}
READ_ERRORS: Responses = {status: ERRORS[status] for status in (401, 405, 408, 431, 500)}


class RequestRoute(APIRoute):
    """Calls its endpoint with the request, and sends what it returns.

    Without what FastAPI prepares for each call: no endpoint here has dependencies, or an exit
    stack to close, and what it raises is answered by a layer around all routes.
    """

    def __init__(self, path: str, endpoint: Endpoint, **options: Any) -> None:
        super().__init__(path, endpoint, **options)

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = answer
        self._is_one_path = not self.param_convertors

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """A path without parameters is one string, and needs no pattern."""
        if not self._is_one_path:
            return super().matches(scope)
        if scope["type"] != "http" or context_of(scope).route_path != self.path:
            return Match.NONE, {}
        chosen = {"endpoint": self.endpoint, "path_params": {}, "route": self}
        return Match.FULL if scope["method"] in (self.methods or ()) else Match.PARTIAL, chosen

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Another method than the route's is for the framework to refuse."""
        if scope["method"] in (self.methods or ()):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)


def body_schema(name: str) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself."""
    reference = {"$ref": f"#/components/schemas/{name}"}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}
    }


def json_response(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")
