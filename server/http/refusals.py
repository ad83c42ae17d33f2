"""What endpoints and the framework raise, as answers."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from server.api.hints import nearest
from server.api.openai_errors import error_response
from server.api.request_context import context_of
from server.errors import InvalidRequestError, MethodNotAllowedError, NotFoundError, ServerError
from server.http.request_record import CLIENT_CLOSED_REQUEST


def add_refusals(app: FastAPI) -> None:
    """Have the app answer its errors in our envelope."""
    app.add_exception_handler(ServerError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServerError), error
    return error_response(error)


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """What the framework itself refuses, in our envelope."""
    assert isinstance(error, HTTPException), error
    method, path = request.method, request.scope["path"][:200]
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(NotFoundError(f"Unknown route {method} {path}{_pointer(request)}"))
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = dict(error.headers or {})
        use = f": use {headers['Allow']}" if "Allow" in headers else ""
        answer = error_response(MethodNotAllowedError(f"{path} does not take {method}{use}"))
        answer.headers.update(headers)
        return answer
    return error_response(InvalidRequestError(f"{error.detail}"))


def _pointer(request: Request) -> str:
    """What somebody who asked for an unknown route may have wanted."""
    known: frozenset[str] = request.app.state.paths
    # A base URL that ends with a slash or with /v1, where the client puts its own.
    parts = [part for part in context_of(request.scope).route_path[:100].split("/") if part]
    once = [part for index, part in enumerate(parts) if index == 0 or part != parts[index - 1]]
    if once in ([], ["v1"]):  # a base URL by itself
        docs = ", /docs" if "/docs" in known else ""
        return f": texts are embedded by POST /v1/embeddings; see also /v1/models, /info{docs}"
    close = nearest("/" + "/".join(once), known)
    return f": did you mean {close}?" if close else ""


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)
