"""What the layers around a dialect refuse is said in its own shape, with the headers of all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import OverloadedError, ServerError, UnavailableError
from tests.server.fakes import AppInProcess, in_process

JSON = {"content-type": "application/json"}
DIALECTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "/v1/embed": ({"texts": ["x"]}, {"message"}),
    "/v2/embed": ({"texts": ["x"]}, {"message"}),
    "/v2/rerank": ({"query": "x", "documents": ["y"]}, {"message"}),
    "/embed": ({"inputs": "x"}, {"error", "error_type"}),
    "/": ({"inputs": "x"}, {"error", "error_type"}),
    "/api/embed": ({"input": "x"}, {"error"}),
    "/api/embeddings": ({"prompt": "x"}, {"error"}),
    "/rerank": ({"query": "x", "documents": ["y"]}, {"error", "detail"}),
    "/openai/deployments/golden-embed/embeddings": ({"input": "x"}, {"error", "detail"}),
}


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False, max_body_bytes=4096) as server:
        yield server


def check(answer: httpx.Response, status: int, keys: set[str]) -> None:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == keys
    text = body.get("message") or body.get("detail") or body["error"]
    assert isinstance(text, str)
    assert text


@pytest.mark.parametrize("path", DIALECTS)
def test_bodies_that_are_not_read(server: AppInProcess, path: str) -> None:
    keys = DIALECTS[path][1]
    post = server.client.post
    check(post(path, content=b"{", headers=JSON), 400, keys)
    check(post(path, content=b"x" * 5000, headers=JSON), 413, keys)
    check(post(path, content=b"{}", headers={"content-type": "text/plain"}), 415, keys)
    check(post(f"/query{path}", content=b"{", headers=JSON), 400, keys)
    if path != "/":
        check(server.client.get(path), 405, keys)


@pytest.mark.parametrize("path", DIALECTS)
@pytest.mark.parametrize(
    "error", [OverloadedError("full", retry_after=3), UnavailableError("none", retry_after=3)]
)
def test_refusals_say_when_to_come_back(
    server: AppInProcess, path: str, error: ServerError
) -> None:
    body, keys = DIALECTS[path]
    server.engine.error = error
    try:
        answer = server.client.post(path, json=body)
    finally:
        server.engine.error = None
    check(answer, error.status, keys)
    assert answer.headers["retry-after"] == "3"


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/pull"])
def test_ollamas_client_shows_our_words_where_there_is_no_route(
    server: AppInProcess, path: str
) -> None:
    check(server.client.post(path, json={"model": "golden-embed"}), 404, {"error"})
    shown = server.client.get("/api/ps")
    check(shown, 404, {"error"})
    assert "/api/" in shown.json()["error"]
