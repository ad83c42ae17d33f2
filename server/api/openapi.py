"""The OpenAPI document: what FastAPI derives, with the bodies that the routes read themselves."""

from __future__ import annotations

import functools
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from prometheus_client import CollectorRegistry

from model.families import NV_EMBED
from model.hub import ModelSource
from server.api import admin, openai, schemas
from server.api.embedding import Embedding
from server.engine.interface import Engine
from server.settings import Settings

TITLE = "NV-Embed server"
SUMMARY = "OpenAI-compatible embeddings from NV-Embed."
_PROBES = ("/livez", "/readyz", "/health", "/ping", "/v1/health/live", "/v1/health/ready")
METRICS_PATHS = frozenset({"/metrics", "/v1/metrics"})
OPEN_PATHS = METRICS_PATHS.union(_PROBES)
"""Probes and scrapers need no key there."""


@functools.cache
def openapi_document() -> dict[str, Any]:
    """The OpenAPI document, which depends on no model and no setting."""
    source = ModelSource("nv-embed", Path(), None, None)
    no_engine = SimpleNamespace(source=source, family=NV_EMBED, prompts={})
    engine, settings = cast(Engine, no_engine), Settings()
    app = FastAPI()
    app.include_router(openai.create_router(Embedding(engine, settings), settings))
    app.include_router(admin.create_router(engine, settings, CollectorRegistry()))
    document = get_openapi(
        title=TITLE, version=version("nv-embed-server"), summary=SUMMARY, routes=app.routes
    )
    components = document["components"]
    # The bodies that the routes read themselves, and nothing of FastAPI's own validation.
    for wire in (schemas.EmbeddingsRequest, schemas.TokenizeRequest):
        schema = wire.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= schema.pop("$defs", {})
        components["schemas"][wire.__name__] = schema
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
