"""The HTTP contract at the edges, of the app in this process: each refusal in the one envelope."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
import yaml

from model.hub import locate
from model.tasks import TASKS
from model.tokenizer import NVEmbedTokenizer
from server.api.openapi import openapi_document
from server.engine.engine import EmbeddingEngine
from server.http.app import create_app
from server.settings import Settings
from tests.server.fakes import AppInProcess, in_process
from tests.server.processes import ROOT

LIMIT = 200_000
UNSUPPORTED = "unsupported_media_type"
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    """A small body limit, dimensions that may be cut, CORS for one origin."""
    with in_process(
        golden_checkpoint,
        max_body_bytes=LIMIT,
        allow_truncated_dimensions=True,
        cors_origin=[ORIGIN],
        served_model_name=["my-embed"],
    ) as server:
        yield server


@pytest.fixture(scope="module")
def plain(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    """The default settings."""
    with in_process(golden_checkpoint) as server:
        yield server


def error_of(answer: httpx.Response) -> dict:
    """The envelope, checked."""
    body = answer.json()
    assert body.keys() == {"error", "detail"}
    assert body["detail"] == body["error"]["message"]
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-request-id"]) >= 1
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "code"),
    [
        ("GET", "/nope", b"", {}, 404, "not_found"),
        ("POST", "/v1/nope", b"{}", {}, 404, "not_found"),
        ("POST", "/v1/v1/embeddings", b"{}", {}, 404, "not_found"),
        ("GET", "/v1/embeddings", b"", {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", b"", {}, 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", b"input=x", {"content-type": "text/plain"}, 415, UNSUPPORTED),
        ("POST", "/v1/embeddings", b"{", {}, 400, None),
        ("POST", "/v1/embeddings", b'{"model": "golden-embed"}', {}, 400, None),
        ("POST", "/v1/embeddings", b'{"model": "x", "input": "y"}', {}, 404, "model_not_found"),
        ("POST", "/v1/embeddings", b" " * (LIMIT + 1), {}, 413, "body_too_large"),
        ("GET", "/v1/models/unknown", b"", {}, 404, "model_not_found"),
        ("POST", "/tokenize", b'{"input": ""}', {}, 400, None),
    ],
)
def test_refusals(
    server: AppInProcess,
    method: str,
    path: str,
    content: bytes,
    headers: dict[str, str],
    status: int,
    code: str | None,
) -> None:
    headers = {"content-type": "application/json"} | headers
    answer = server.client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert server.client.get("/livez").status_code == 200


def test_a_chunked_body_is_limited_too(server: AppInProcess) -> None:
    chunks = (b" " * 10_000 for _ in range(30))
    answer = server.client.post(
        "/v1/embeddings", content=chunks, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_the_request_id_is_echoed_or_replaced(server: AppInProcess) -> None:
    given = server.client.get("/livez", headers={"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    for bad in ("a b", "x" * 200, "<script>"):
        replaced = server.client.get("/livez", headers={"x-request-id": bad})
        assert replaced.headers["x-request-id"] != bad
        assert len(replaced.headers["x-request-id"]) == 32


def test_cut_dimensions(server: AppInProcess) -> None:
    fields = {"model": "my-embed", "input": "x"}
    whole = server.client.post("/v1/embeddings", json=fields).json()["data"][0]["embedding"]
    answer = server.client.post("/v1/embeddings", json={**fields, "dimensions": 16})
    cut = answer.json()["data"][0]["embedding"]
    assert len(cut) == 16
    assert sum(x * x for x in cut) == pytest.approx(1, abs=1e-5)
    assert cut[3] / cut[0] == pytest.approx(whole[3] / whole[0], abs=1e-4)


def test_dimensions_of_the_models_training_need_no_flag(plain: AppInProcess) -> None:
    fields = {"model": plain.engine.source.model_id, "input": "x", "dimensions": 16}
    assert plain.client.post("/v1/embeddings", json=fields).status_code == 400
    plain.engine.matryoshka_dimensions = (16,)
    assert plain.client.get("/info").json()["matryoshka_dimensions"] == [16]
    answer = plain.client.post("/v1/embeddings", json=fields).json()
    plain.engine.matryoshka_dimensions = ()
    assert len(answer["data"][0]["embedding"]) == 16


def test_cors_is_for_the_named_origin_only(server: AppInProcess) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return server.client.options("/v1/embeddings", headers=headers)

    allowed = preflight(ORIGIN)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in preflight("https://evil.example").headers


def test_a_refused_key_has_cors_headers_too(golden_checkpoint: Path) -> None:
    """Without them a browser shows a network error instead of the message."""
    origin = {"origin": ORIGIN}
    with in_process(golden_checkpoint, api_key=["secret"], cors_origin=[ORIGIN]) as server:
        refused = server.client.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == ORIGIN
        allowed = {**origin, "authorization": "bearer secret"}
        assert server.client.get("/v1/models", headers=allowed).status_code == 200
        assert server.client.get("/readyz").status_code == 200


def test_without_cors_options_there_is_none(plain: AppInProcess) -> None:
    headers = {"origin": ORIGIN, "access-control-request-method": "POST"}
    answer = plain.client.options("/v1/embeddings", headers=headers)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_the_short_route_is_the_same(server: AppInProcess) -> None:
    fields = {"model": "my-embed", "input": "x"}
    assert (
        server.client.post("/embeddings", json=fields).json()
        == server.client.post("/v1/embeddings", json=fields).json()
    )


def test_a_served_name_lists_itself_and_keeps_the_checkpoints(server: AppInProcess) -> None:
    ids = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    assert ids == ["my-embed", "my-embed-query", "my-embed-passage"]
    for name in ("my-embed", "MY-EMBED-query", "golden"):
        fields = {"model": name, "input": "x"}
        assert server.client.post("/v1/embeddings", json=fields).status_code == 200, name


def test_instructions_lists_the_tasks(server: AppInProcess) -> None:
    answer = server.client.get("/v1/instructions").json()
    assert [task["task"] for task in answer["data"]] == list(TASKS)
    assert answer["default_input_type"] == "none"


def test_info(server: AppInProcess) -> None:
    info = server.client.get("/info").json()
    assert info["model"] == "my-embed"
    assert info["dimensions"] == 64
    (device,) = info["devices"]
    assert {name: device[name] for name in ("device", "dtype", "attention")} == {
        "device": "cpu",
        "dtype": "float32",
        "attention": "fake",
    }
    assert info["limits"]["max_body_bytes"] == LIMIT


def test_ids_with_an_instruction_are_refused(server: AppInProcess) -> None:
    fields = {"model": "my-embed", "input": [1, 315, 2], "input_type": "query"}
    answer = server.client.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400
    assert "instruction cannot be put before token ids" in error_of(answer)["message"]
    # A passage needs no instruction, so its ids are fine.
    fields["input_type"] = "passage"
    assert server.client.post("/v1/embeddings", json=fields).status_code == 200


def test_truncation_keeps_the_end(server: AppInProcess) -> None:
    fields = {"model": "my-embed", "input": "one two three four five", "input_type": "query"}
    whole = server.client.post("/tokenize", json=fields).json()["data"][0]
    start = whole["instruction_tokens"]
    kept = server.client.post("/tokenize", json={**fields, "truncate_prompt_tokens": start + 3})
    assert kept.json()["data"][0]["ids"] == whole["ids"][:start] + whole["ids"][-3:]


def test_minus_one_truncates_to_what_fits(server: AppInProcess) -> None:
    fields = {"input": "word " * 33_000, "truncate_prompt_tokens": -1}
    cut = server.client.post("/tokenize", json=fields).json()["data"][0]
    assert cut["count"] == 32_768
    refused = server.client.post("/tokenize", json={**fields, "truncate_prompt_tokens": 1})
    assert error_of(refused)["param"] == "truncate_prompt_tokens"


def test_a_huge_instruction_is_refused_at_once(
    plain: AppInProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tokenized: not once on the event loop, nor once for each of many inputs."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(NVEmbedTokenizer, "_ids", refuse)
    for prompt, inputs in (("word " * 600_000, "x"), ("word " * 20_000, ["x"] * 2048)):
        answer = plain.embed(input=inputs, prompt=prompt)
        assert answer.status_code == 400
        assert "token" in error_of(answer)["message"]


def test_a_truncated_instruction_leaves_nothing_to_embed(server: AppInProcess) -> None:
    fields = {"model": "my-embed", "input": "x", "input_type": "query", "truncate_prompt_tokens": 5}
    answer = server.client.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400
    assert "nothing is left to embed" in error_of(answer)["message"]


DEATHS = ("crash", "hang", "device", "nonsense")
REFUSALS = ("queue", "key_share", "bytes", "connections", "not_ready", "draining")


def test_metrics_are_there_from_the_start(golden_checkpoint: Path) -> None:
    settings = Settings(devices=["cpu"])
    engine = EmbeddingEngine(settings, locate(str(golden_checkpoint)))
    app = create_app(settings, engine, engine.metrics)

    async def scrape() -> str:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.get("/metrics")).text

    text = asyncio.run(scrape())
    for line in (
        'nv_embed_requests_total{route="embeddings",status="200"} 0.0',
        "nv_embed_inputs_total 0.0",
        "nv_embed_tokens_total 0.0",
        "nv_embed_rejected_requests_total 0.0",
        *(f'nv_embed_worker_deaths_total{{cause="{cause}"}} 0.0' for cause in DEATHS),
        *(f'nv_embed_refused_requests_total{{reason="{reason}"}} 0.0' for reason in REFUSALS),
        'nv_embed_worker_busy_seconds_total{device="cpu",worker="0"} 0.0',
        'nv_embed_request_duration_seconds_bucket{le="0.5"} 0.0',
        "nv_embed_workers 1.0",
        "nv_embed_max_queued_tokens 1e+06",
        "nv_embed_max_batch_tokens 1024.0",
        "nv_embed_workers_ready 0.0",
        "nv_embed_batch_tokens_count 0.0",
        "nv_embed_inflight_bytes 0.0",
        "vllm:num_requests_waiting 0.0",
        "vllm:num_requests_running 0.0",
    ):
        assert f"\n{line}\n" in text, line


def test_openapi_yaml_is_the_apps(server: AppInProcess) -> None:
    """`make openapi` writes it. JSON makes tuples and keys of both sides alike."""
    document = orjson.loads(orjson.dumps(openapi_document()))
    assert yaml.safe_load((ROOT / "openapi.yaml").read_text()) == document
    assert server.client.get("/openapi.json").json() == document


def test_openapi_documents_every_status_of_the_embeddings_route() -> None:
    operation = openapi_document()["paths"]["/v1/embeddings"]["post"]
    assert {int(status) for status in operation["responses"]} == {
        *(200, 400, 401, 404, 405, 408, 409, 413, 415, 429, 431, 500, 503, 504)
    }


def test_what_nobody_foresaw_is_a_500_that_names_its_log_line(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, tracebacks=1) as server:
        server.engine.error = LookupError("an inner secret")
        failed = server.embed(input="x")
        assert failed.status_code == 500
        error = error_of(failed)
        request_id = failed.headers["x-request-id"]
        assert (error["code"], error["type"]) == ("internal_error", "server_error")
        assert request_id in error["message"]
        assert "an inner secret" not in failed.text
        assert "LookupError: an inner secret" in server.log
        assert f"request_id={request_id}" in server.log
        server.engine.error = None
        assert server.embed(input="x").status_code == 200


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, math.inf),
        ({"x-stainless-read-timeout": "30"}, 30),
        ({"x-stainless-timeout": "20"}, 20),
        ({"x-stainless-read-timeout": "30", "x-stainless-timeout": "20"}, 30),
        ({"x-stainless-read-timeout": "soon", "x-stainless-timeout": "20"}, 20),
        *(({"x-stainless-read-timeout": bad}, math.inf) for bad in ("nan", "inf", "0", "-1", "")),
    ],
)
def test_the_sdks_time_out_is_the_jobs_deadline(
    plain: AppInProcess, headers: dict[str, str], seconds: float
) -> None:
    before = time.monotonic()
    body = {"model": "golden-embed", "input": "x"}
    assert plain.client.post("/v1/embeddings", json=body, headers=headers).status_code == 200
    deadline = plain.engine.jobs[-1].deadline
    assert before + seconds <= deadline <= time.monotonic() + seconds
