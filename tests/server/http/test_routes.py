"""Which route answers, and what is said where none does: the app in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.schemas import EMBEDDINGS_PATHS
from tests.server.fakes import AppInProcess, in_process


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint) as server:
        yield server


def message_of(answer: httpx.Response) -> str:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("//v1/embeddings", "/v1/embeddings"),
        ("/v1//embeddings", "/v1/embeddings"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/V1/Embeddings", "/v1/embeddings"),
        ("/v1/model", "/v1/models"),
        ("/tokenise", "/tokenize"),
        ("/heath", "/health"),
    ],
)
def test_a_route_that_is_nearly_one(server: AppInProcess, path: str, meant: str) -> None:
    answer = server.client.post(httpx.URL(server.url, path=path), json={})
    assert answer.status_code == 404
    assert message_of(answer).endswith(f"Unknown route POST {path}: did you mean {meant}?")


def test_the_route_of_most_requests_is_looked_for_first(server: AppInProcess) -> None:
    """Paths are compared in turn: behind five others it cost 7 us of a call of 67."""
    first, second = (getattr(route, "path", None) for route in server.app.routes[:2])
    assert (first, second) == EMBEDDINGS_PATHS


def test_other_unknown_routes(server: AppInProcess) -> None:
    for base in ("/v1", "/v1/"):
        root = message_of(server.client.get(base))
        for pointer in ("POST /v1/embeddings", "/v1/models", "/docs"):
            assert pointer in root
    far = message_of(server.client.get("/v1/chat/completions"))
    assert far == "Unknown route GET /v1/chat/completions"
    assert len(message_of(server.client.get("/" + "x" * 5000))) < 300


@pytest.mark.parametrize(
    ("method", "path", "use"),
    [("GET", "/v1/embeddings", "POST"), ("GET", "/tokenize", "POST"), ("POST", "/info", "GET")],
)
def test_a_wrong_method_says_the_right_one(
    server: AppInProcess, method: str, path: str, use: str
) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == 405
    assert message_of(answer) == f"{path} does not take {method}: use {use}"
    assert answer.headers["allow"] == use


def test_models_are_found_without_v1(server: AppInProcess) -> None:
    for path in ("/models", "/models/golden-embed", "/models/golden-embed-query"):
        assert server.client.get(path).json() == server.client.get(f"/v1{path}").json()
    assert server.client.get("/models/other").status_code == 404
    metrics = server.client.get("/metrics").text
    assert 'nv_embed_requests_total{route="models",status="404"} 1.0' in metrics
