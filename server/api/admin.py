"""What runs here and how it is: /info, health and metrics."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from server.api import answer_schemas
from server.api.names import ServedNames
from server.api.request_context import context_of
from server.api.routing import ERRORS, READ_ERRORS, Endpoint, RequestRoute, Responses, json_response
from server.engine.interface import Engine
from server.errors import UnavailableError
from server.settings import MAX_REQUEST_INPUTS, MAX_REQUEST_TOKENS, Settings

_TRUNCATED = {True: "keep EOS", False: "lose EOS", None: "have none"}
"""By Family.keeps_eos."""


_POOLING_OF_TEI = {"latent": "mean", "mean": "mean", "last": "last_token"}
"""Its clients refuse words that it does not have; what latents are averaged to is a mean, too."""


class _Endpoints:
    """The endpoints over one engine."""

    def __init__(self, engine: Engine, settings: Settings, registry: CollectorRegistry) -> None:
        self._engine, self._settings, self._registry = engine, settings, registry
        self._name = ServedNames(engine.source.model_id, settings.served_model_name).names[0]

    async def info(self, request: Request) -> Response:
        """What runs here: model, licence, devices, limits, version."""
        engine, limits, family = self._engine, self._engine.limits, self._engine.family
        return json_response(
            {
                "version": version("nv-embed-server"),
                "model": self._name,
                "revision": engine.source.revision,
                "license": engine.source.license,
                "family": family.name,
                "mask": family.mask,
                "pooler": family.pooler,
                "template": family.template,
                "truncated_inputs": _TRUNCATED[family.keeps_eos],
                "dimensions": engine.dimensions,
                "matryoshka_dimensions": list(engine.matryoshka_dimensions),
                **self._for_tei(),
                "devices": [
                    {name: getattr(runner, name) for name in answer_schemas.Device.model_fields}
                    for runner in engine.runners
                ],
                "limits": {
                    "max_input_tokens": limits.max_input_tokens,
                    "max_request_inputs": MAX_REQUEST_INPUTS,
                    "max_request_tokens": MAX_REQUEST_TOKENS,
                    "max_batch_tokens": limits.max_batch_tokens,
                    "max_batch_seqs": self._settings.max_batch_seqs,
                    "max_queued_tokens": limits.max_queued_tokens,
                    "max_body_bytes": self._settings.max_body_bytes,
                },
            }
        )

    def _for_tei(self) -> dict[str, object]:
        """What text-embeddings-inference's clients read."""
        engine, limits = self._engine, self._engine.limits
        revision = engine.source.revision or engine.fingerprint
        return {
            "model_id": engine.source.model_id,
            "model_sha": revision,
            "sha": revision,
            "docker_label": None,
            "model_dtype": engine.runners[0].dtype if engine.runners else "",
            "model_type": {"embedding": {"pooling": _POOLING_OF_TEI[engine.family.pooler]}},
            "max_input_length": limits.max_input_tokens,
            "max_batch_tokens": max(limits.max_batch_tokens),
            "max_batch_requests": self._settings.max_batch_seqs,
            "max_client_batch_size": MAX_REQUEST_INPUTS,
            "max_concurrent_requests": MAX_REQUEST_INPUTS,
            "auto_truncate": self._settings.truncate != "none",
            "tokenization_workers": 1,
        }

    async def livez(self, request: Request) -> Response:
        """The process answers."""
        return json_response({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Ready to serve: a worker is up, and the server is not shutting down."""
        if reason := self._engine.not_ready:
            raise UnavailableError(f"not ready: {reason}", retry_after=2)
        return json_response({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """As NIM answers: alive, or ready to serve."""
        is_ready = context_of(request.scope).route_path.endswith("ready")
        if is_ready and (reason := self._engine.not_ready):
            raise UnavailableError(f"not ready: {reason}", retry_after=2)
        state = "ready" if is_ready else "live"
        answer = {"object": "health.response", "message": state, state: True}
        return json_response(answer)

    async def version(self, request: Request) -> Response:
        """Of this server, and its interface's."""
        return json_response({"version": version("nv-embed-server"), "release": "", "api": "v1"})

    async def metadata(self, request: Request) -> Response:
        """As NIM answers: what is served, and under which licence."""
        source = self._engine.source
        licence = {"name": source.license or "", "path": "", "sha": "", "size": 0, "url": ""}
        model = {"shortName": self._name, "modelUrl": source.model_id}
        facts = {
            "modelInfo": [model],
            "licenseInfo": licence,
            "version": version("nv-embed-server"),
        }
        return json_response({**facts, "assetInfo": [], "repository_override": ""})

    async def license(self, request: Request) -> Response:
        """The licence of the weights, as the model's card names it."""
        name = self._engine.source.license or ""
        return json_response({"name": name, "content": self._engine.source.notice or name})

    async def metrics(self, request: Request) -> Response:
        """Prometheus metrics."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def create_router(engine: Engine, settings: Settings, registry: CollectorRegistry) -> APIRouter:
    """The routes over one engine and its metrics."""
    router = APIRouter(route_class=RequestRoute)
    endpoints = _Endpoints(engine, settings, registry)
    health: Responses = {200: {"model": answer_schemas.Health}}
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    routes: list[tuple[str, Endpoint, Responses]] = [
        ("/info", endpoints.info, {200: {"model": answer_schemas.Info}}),
        ("/livez", endpoints.livez, health),
        ("/readyz", endpoints.readyz, {**health, 503: ERRORS[503]}),
        ("/health", endpoints.readyz, {**health, 503: ERRORS[503]}),
        ("/metrics", endpoints.metrics, {200: text}),
    ]
    others: dict[str, Endpoint] = {
        "/ping": endpoints.readyz,
        "/version": endpoints.version,
        "/v1/version": endpoints.version,
        "/v1/health/live": endpoints.health,
        "/v1/health/ready": endpoints.health,
        "/v1/metadata": endpoints.metadata,
        "/v1/license": endpoints.license,
        "/v1/metrics": endpoints.metrics,
    }
    for path, endpoint, responses in routes:
        router.add_api_route(
            path,
            endpoint,
            methods=["GET"],
            tags=["server"],
            operation_id=path.strip("/"),
            response_class=Response,
            responses={**responses, **READ_ERRORS},
        )
    for path, endpoint in others.items():
        router.add_api_route(path, endpoint, methods=["GET"], include_in_schema=False)
    return router
