"""create_app(settings, engine): wiring only. And the OpenAPI document, which needs neither."""

from __future__ import annotations

import functools
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse
from starlette.routing import Route

from model.hub import ModelSource
from server.api import schemas
from server.api.byte_budget import ByteBudget
from server.api.hints import nearest
from server.api.openai import EMBEDDINGS_PATHS, IGNORED_HEADER, ClientGoneError, create_router
from server.engine.engine import EmbeddingEngine
from server.errors import InvalidRequestError, MethodNotAllowedError, NotFoundError, ServerError
from server.http.middleware import (
    CLIENT_CLOSED_REQUEST,
    OPEN_PATHS,
    Gate,
    RequestRecord,
    ShortCut,
    error_response,
)
from server.settings import Settings

TITLE = "NV-Embed server"
SUMMARY = "OpenAI-compatible embeddings from NV-Embed."


def create_app(settings: Settings, engine: EmbeddingEngine) -> FastAPI:
    """The ASGI application over an engine, which the caller starts and stops.

    Raises SettingsError when the file of keys cannot be used.
    """
    app = FastAPI(
        title=TITLE,
        summary=SUMMARY,
        root_path=_prefix(settings.root_path),
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,  # both pages are ours: they say what they need
        redoc_url=None,
    )
    if settings.docs:
        _add_pages(app)
    router = create_router(engine, settings)
    app.include_router(router)
    routes = [r for r in (*router.routes, *app.routes) if isinstance(r, Route)]
    app.state.paths = frozenset(route.path for route in routes if "{" not in route.path)
    refusals = {
        ServerError: _answer_error,
        HTTPException: _answer_http_exception,
        ClientGoneError: _answer_nobody,
        ClientDisconnect: _answer_nobody,
    }
    for error, handler in refusals.items():
        app.add_exception_handler(error, handler)
    # The last one added is the outermost.
    endpoints = {
        ("POST", route.path): route.endpoint
        for route in router.routes
        if isinstance(route, APIRoute) and route.path in EMBEDDINGS_PATHS
    }
    app.add_middleware(ShortCut, endpoints=endpoints, refusals=refusals)
    open_paths = OPEN_PATHS - ({"/metrics"} if settings.metrics_need_key else set())
    app.add_middleware(Gate, keys=settings.api_keys(), open_paths=open_paths)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", IGNORED_HEADER],
        )
    budget = ByteBudget(settings.max_inflight_bytes)
    engine.metrics.gauge(
        "nv_embed_inflight_bytes",
        "Bytes of bodies and answers that requests hold in memory",
        lambda: budget.used,
    )
    app.add_middleware(RequestRecord, engine=engine, budget=budget, access_log=settings.access_log)
    app.openapi = openapi_document  # type: ignore[method-assign]
    return app


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
    parts = [part for part in request.scope["route_path"][:100].split("/") if part]
    once = [part for index, part in enumerate(parts) if index == 0 or part != parts[index - 1]]
    if once in ([], ["v1"]):  # a base URL by itself
        docs = ", /docs" if "/docs" in known else ""
        return f": texts are embedded by POST /v1/embeddings; see also /v1/models, /info{docs}"
    close = nearest("/" + "/".join(once), known)
    return f": did you mean {close}?" if close else ""


def _prefix(root_path: str) -> str:
    bare = root_path.strip("/")
    return f"/{bare}" if bare else ""


def _add_pages(app: FastAPI) -> None:
    async def docs(request: Request) -> Response:
        schema = f"{app.root_path}/openapi.json"
        return _explained(get_swagger_ui_html(openapi_url=schema, title=TITLE))

    async def redoc(request: Request) -> Response:
        schema = f"{app.root_path}/openapi.json"
        return _explained(get_redoc_html(openapi_url=schema, title=TITLE))

    app.add_route("/docs", docs, include_in_schema=False)
    app.add_route("/redoc", redoc, include_in_schema=False)


def _explained(page: HTMLResponse) -> HTMLResponse:
    """The framework's page loads its scripts from elsewhere, and is blank without them."""
    words = (
        "This page needs scripts from cdn.jsdelivr.net, which did not load. The document itself, "
        'which needs none, is <a href="openapi.json">openapi.json</a>.'
    )
    show = "document.getElementById('no-scripts').hidden = false"
    html = bytes(page.body).decode()
    html = html.replace("<body>", f'<body><p id="no-scripts" hidden>{words}</p>', 1)
    html = html.replace("</body>", f"<noscript><p>{words}</p></noscript></body>", 1)
    html = html.replace('<script src="https:', f'<script onerror="{show}" src="https:', 1)
    return HTMLResponse(html)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


@functools.cache
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
