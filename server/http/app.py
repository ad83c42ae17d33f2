"""create_app: the dialects' routes and the layers around them. Wiring only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api import admin, cohere, ollama, openai, rerank, tei
from server.api.body import IGNORED_HEADER
from server.api.byte_budget import ByteBudget
from server.api.embedding import HEADERS, Embedding
from server.api.names import ServedNames
from server.api.openapi import METRICS_PATHS, OPEN_PATHS, SUMMARY, TITLE, openapi_document
from server.engine.interface import Engine
from server.engine.metrics import Metrics
from server.errors import SettingsError
from server.http.gate import Gate
from server.http.pages import add_pages
from server.http.refusals import Refusals
from server.http.request_record import RequestRecord
from server.settings import Settings

if TYPE_CHECKING:
    from server.http.trace_export import TraceExport

_SHAPES = {
    **dict.fromkeys((*cohere.PATHS, rerank.COHERE_PATH), cohere.error_response),
    **dict.fromkeys((*tei.EMBED_PATHS, tei.SIMILARITY_PATH), tei.error_response),
    ollama.FOLDER: ollama.error_response,
}
"""Path, or first folder of paths -> how its dialect writes an error; the others as OpenAI's."""


class _App(FastAPI):
    """FastAPI's routes within our own layers alone: they answer what is raised, bodies have limits
    of their own, and no endpoint has an exit stack."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.middleware_stack is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        if self.root_path:
            scope["root_path"] = self.root_path
        await self.middleware_stack(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = self.router.app
        for layer in reversed(self.user_middleware):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return app


def create_app(
    settings: Settings, engine: Engine, metrics: Metrics, traces: TraceExport | None = None
) -> FastAPI:
    """The ASGI application over an engine, which the caller starts and stops. traces: where they
    go, if anywhere; the caller closes it.

    Raises SettingsError when the file of keys cannot be used.
    """
    app = _App(
        title=TITLE,
        summary=SUMMARY,
        redirect_slashes=False,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,  # the pages are ours: the framework's load their scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # nobody asked for it
    )
    app.root_path = _prefix(settings.root_path)  # as an argument it is deprecated, and warned of
    embedding = Embedding(engine, settings)
    routers = (
        openai.create_router(embedding, settings),
        admin.create_router(engine, settings, metrics.registry),
        *(dialect.create_router(embedding, settings) for dialect in (cohere, tei, ollama, rerank)),
    )
    # Not included, which has each request matched twice; before the framework's own; and those of
    # most requests first, for each is compared with the paths in turn.
    app.router.routes[:0] = [route for router in routers for route in router.routes]
    pages = add_pages(app, docs=settings.docs, playground=settings.playground)
    _add_layers(app, settings, engine, metrics, pages, traces)
    app.openapi = openapi_document  # type: ignore[method-assign]
    return app


def _add_layers(
    app: FastAPI,
    settings: Settings,
    engine: Engine,
    metrics: Metrics,
    pages: frozenset[str],
    traces: TraceExport | None,
) -> None:
    """From the innermost to the outermost. CORS is around the refusals, which need its headers."""
    open_paths = OPEN_PATHS - (METRICS_PATHS if settings.metrics_need_key else set())
    keys = settings.api_keys()
    if settings.max_key_share < 1 and not any(one.name for one in keys):
        raise SettingsError("--max-key-share needs keys with names (name:key)")
    app.add_middleware(Gate, keys=keys, open_paths=open_paths, pages=pages)
    routes = (route.path for route in app.routes if isinstance(route, Route))
    paths = frozenset(path for path in routes if "{" not in path)
    app.add_middleware(Refusals, paths=paths, shapes=_SHAPES)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origin,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", IGNORED_HEADER, *HEADERS],
        )
    if traces is not None:
        from server.http.tracing import Tracing  # which needs OpenTelemetry's packages

        app.add_middleware(
            Tracing,
            export=traces,
            model=ServedNames(engine.source.model_id, settings.served_model_name).names[0],
            dimensions=engine.dimensions,
            paths=paths,
        )
    budget = ByteBudget(settings.max_inflight_bytes, lambda: metrics.count_refused("bytes"))
    metrics.constant(
        "nv_embed_max_inflight_bytes", "Of --max-inflight-bytes", settings.max_inflight_bytes
    )
    metrics.name_keys({one.name for one in keys if one.name})
    metrics.gauge(
        "nv_embed_inflight_bytes",
        "Bytes of bodies and answers that requests hold in memory",
        lambda: budget.used,
    )
    app.add_middleware(
        RequestRecord,
        engine=engine,
        metrics=metrics,
        budget=budget,
        access_log=settings.access_log,
    )


def _prefix(root_path: str) -> str:
    bare = root_path.strip("/")
    return f"/{bare}" if bare else ""
