"""Paths, methods and headers as clients of other servers have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.fakes import AppInProcess, in_process
from tests.server.processes import ServerProcess, serving

GETS = [
    *("/v1/models", "/models", "/v1/models/golden-embed", "/info", "/v1/instructions"),
    *("/livez", "/readyz", "/health", "/metrics", "/openapi.json", "/docs", "/api/tags"),
    *("/ping", "/version", "/v1/version", "/v1/metadata", "/v1/license", "/v1/metrics"),
    *("/v1/health/live", "/v1/health/ready", "/api/version"),
]


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


@pytest.fixture(scope="module")
def process(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("names") / "log"
    options = ("--runner", "tests.server.runners:Hashing")
    with serving(golden_checkpoint, *options, log=log) as server:
        yield server


@pytest.mark.process
@pytest.mark.parametrize("path", GETS)
def test_head_wherever_there_is_get(process: ServerProcess, path: str) -> None:
    get, head = process.client.get(path), process.client.head(path)
    assert get.status_code == head.status_code == 200
    assert head.content == b""
    own = {"date", "x-request-id", "content-length"}  # metrics change, and each has its own
    assert set(head.headers) == set(get.headers)
    for name in set(get.headers) - own:
        assert head.headers[name] == get.headers[name]
    # The connection goes on.
    assert process.client.get("/livez").status_code == 200


@pytest.mark.process
def test_head_of_what_is_no_get(process: ServerProcess) -> None:
    assert process.client.head("/v1/embeddings").status_code == 405
    assert process.client.head("/nope").status_code == 404
    assert process.client.get("/livez").status_code == 200


def test_a_slash_behind(server: AppInProcess) -> None:
    for path in GETS:
        assert server.client.get(f"{path}/").status_code == 200, path
    for path, body in {
        "/v1/embeddings/": {"input": "x"},
        "/query/v1/embeddings/": {"input": "x"},
        "/embed/": {"inputs": "x"},
        "/tokenize/": {"input": "x"},
        "/query/": {"inputs": "x"},
        "/query": {"inputs": "x"},
    }.items():
        assert server.client.post(path, json=body).status_code == 200, path


@pytest.mark.parametrize("path", ["/v1/v1/embeddings", "/v1/v1/models", "/query/v1/v1/embeddings"])
def test_v1_twice_is_said(server: AppInProcess, path: str) -> None:
    refused = server.client.post(path, json={"input": "x"})
    assert refused.status_code == 404
    message = refused.json()["error"]["message"]
    assert f"did you mean {path.removeprefix('/query').removeprefix('/v1')}?" in message
    assert "It has /v1 twice: the client puts one behind its base URL." in message


def test_nims_health(server: AppInProcess) -> None:
    ready = server.client.get("/v1/health/ready").json()
    assert ready == {"object": "health.response", "message": "ready", "ready": True}
    server.engine.not_ready = "it starts"
    try:
        assert server.client.get("/v1/health/ready").status_code == 503
        assert server.client.get("/ping").status_code == 503
        assert server.client.get("/v1/health/live").json()["live"] is True
    finally:
        server.engine.not_ready = None
    metadata = server.client.get("/v1/metadata").json()
    assert metadata["modelInfo"][0]["shortName"] == "golden-embed"


def test_probes_need_no_key_and_the_rest_does(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, api_key=["secret"], metrics_need_key=True) as server:
        for path in ("/ping", "/v1/health/live", "/v1/health/ready", "/livez/"):
            assert server.client.get(path).status_code == 200
        for path in ("/v1/metrics", "/metrics", "/metrics/", "/v1/metadata", "/query/v1/models"):
            assert server.client.get(path).status_code == 401


def test_tokenize_takes_the_others_names(server: AppInProcess) -> None:
    expected = server.client.post("/tokenize", json={"input": "some words"}).json()
    for body in ({"prompt": "some words"}, {"inputs": "some words"}):
        assert server.client.post("/tokenize", json=body).json() == expected
    both = server.client.post("/tokenize", json={"input": "words", "prompt": "some "}).json()
    assert both["prefix"] == "some "


def test_an_errors_detail_is_its_message(server: AppInProcess) -> None:
    """By which voyageai's client tells its errors apart."""
    refused = server.client.post("/v1/embeddings", json={"input": ""}).json()
    assert refused["detail"] == refused["error"]["message"]
