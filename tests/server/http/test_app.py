"""The HTTP contract at the edges, on a real server: every refusal in the one envelope."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import orjson
import pytest
import yaml

from model.tasks import TASKS
from server.api.openapi import openapi_document
from tests.server.processes import ROOT, ServerProcess, serving

LIMIT = 200_000
UNSUPPORTED = "unsupported_media_type"
FAKE = ("--runner", "tests.server.runners:Hashing")


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A small body limit, dimensions that may be cut, CORS for one origin."""
    options = ("--max-body-bytes", str(LIMIT), "--allow-truncated-dimensions")
    options += ("--cors-origin", "https://app.example", "--served-model-name", "my-embed")
    log = tmp_path_factory.mktemp("app") / "log"
    with serving(golden_checkpoint, *options, log=log) as server:
        yield server


def error_of(answer: httpx.Response) -> dict:
    """The envelope, checked."""
    body = answer.json()
    assert body.keys() == {"error"}
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
        ("POST", "/v1/embeddings/", b"{}", {}, 404, "not_found"),
        ("GET", "/v1/embeddings", b"", {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", b"", {}, 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", b"input=x", {"content-type": "text/plain"}, 415, UNSUPPORTED),
        ("POST", "/v1/embeddings", b"{", {}, 400, None),
        ("POST", "/v1/embeddings", b'{"input": "x"}', {}, 400, None),
        ("POST", "/v1/embeddings", b'{"model": "x", "input": "y"}', {}, 404, "model_not_found"),
        ("POST", "/v1/embeddings", b" " * (LIMIT + 1), {}, 413, "body_too_large"),
        ("GET", "/v1/models/unknown", b"", {}, 404, "model_not_found"),
        ("POST", "/tokenize", b'{"input": ""}', {}, 400, None),
    ],
)
def test_refusals(
    server: ServerProcess,
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


def test_a_chunked_body_is_limited_too(server: ServerProcess) -> None:
    chunks = (b" " * 10_000 for _ in range(30))
    answer = server.client.post(
        "/v1/embeddings", content=chunks, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


def test_the_request_id_is_echoed_or_replaced(server: ServerProcess) -> None:
    given = server.client.get("/livez", headers={"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    for bad in ("a b", "x" * 200, "<script>"):
        replaced = server.client.get("/livez", headers={"x-request-id": bad})
        assert replaced.headers["x-request-id"] != bad
        assert len(replaced.headers["x-request-id"]) == 32


def test_cut_dimensions(server: ServerProcess) -> None:
    fields = {"model": "my-embed", "input": "x"}
    whole = server.client.post("/v1/embeddings", json=fields).json()["data"][0]["embedding"]
    answer = server.client.post("/v1/embeddings", json={**fields, "dimensions": 16})
    cut = answer.json()["data"][0]["embedding"]
    assert len(cut) == 16
    assert sum(x * x for x in cut) == pytest.approx(1, abs=1e-5)
    assert cut[3] / cut[0] == pytest.approx(whole[3] / whole[0], abs=1e-4)


def test_cors_is_for_the_named_origin_only(server: ServerProcess) -> None:
    def preflight(origin: str) -> httpx.Response:
        headers = {"origin": origin, "access-control-request-method": "POST"}
        return server.client.options("/v1/embeddings", headers=headers)

    allowed = preflight("https://app.example")
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in preflight("https://evil.example").headers


def test_a_refused_key_has_cors_headers_too(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Without them a browser shows a network error instead of the message."""
    options = ("--api-key", "secret", "--cors-origin", "https://app.example", *FAKE)
    origin = {"origin": "https://app.example"}
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        refused = server.client.get("/v1/models", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        allowed = {**origin, "authorization": "bearer secret"}
        assert server.client.get("/v1/models", headers=allowed).status_code == 200
        assert server.client.get("/readyz").status_code == 200


def test_without_cors_options_there_is_none(golden_server: ServerProcess) -> None:
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    answer = golden_server.client.options("/v1/embeddings", headers=headers)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers


def test_the_short_route_is_the_same(server: ServerProcess) -> None:
    fields = {"model": "my-embed", "input": "x"}
    assert (
        server.client.post("/embeddings", json=fields).json()
        == server.client.post("/v1/embeddings", json=fields).json()
    )


def test_a_served_name_lists_itself_and_keeps_the_checkpoints(server: ServerProcess) -> None:
    ids = [model["id"] for model in server.client.get("/v1/models").json()["data"]]
    assert ids == ["my-embed", "my-embed-query", "my-embed-passage"]
    for name in ("my-embed", "MY-EMBED-query", "golden"):
        fields = {"model": name, "input": "x"}
        assert server.client.post("/v1/embeddings", json=fields).status_code == 200, name


def test_instructions_lists_the_tasks(server: ServerProcess) -> None:
    answer = server.client.get("/v1/instructions").json()
    assert [task["task"] for task in answer["data"]] == list(TASKS)
    assert answer["default_input_type"] == "none"


def test_info(server: ServerProcess) -> None:
    info = server.client.get("/info").json()
    assert info["model"] == "my-embed"
    assert info["dimensions"] == 64
    assert info["devices"][0]["dtype"] == "float32"
    assert info["devices"][0]["attention"] == "sdpa"
    assert info["limits"]["max_body_bytes"] == LIMIT


def test_ids_with_an_instruction_are_refused(server: ServerProcess) -> None:
    fields = {"model": "my-embed", "input": [1, 315, 2], "input_type": "query"}
    answer = server.client.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400
    assert "instruction cannot be put before token ids" in error_of(answer)["message"]
    # A passage needs no instruction, so its ids are fine.
    fields["input_type"] = "passage"
    assert server.client.post("/v1/embeddings", json=fields).status_code == 200


def test_truncation_keeps_the_end(server: ServerProcess) -> None:
    fields = {"model": "my-embed", "input": "one two three four five", "input_type": "query"}
    whole = server.client.post("/tokenize", json=fields).json()["data"][0]
    start = whole["instruction_tokens"]
    kept = server.client.post("/tokenize", json={**fields, "truncate_prompt_tokens": start + 3})
    assert kept.json()["data"][0]["ids"] == whole["ids"][:start] + whole["ids"][-3:]


def test_minus_one_truncates_to_what_fits(server: ServerProcess) -> None:
    fields = {"input": "word " * 33_000, "truncate_prompt_tokens": -1}
    cut = server.client.post("/tokenize", json=fields).json()["data"][0]
    assert cut["count"] == 32_768
    refused = server.client.post("/tokenize", json={**fields, "truncate_prompt_tokens": 1})
    assert error_of(refused)["param"] == "truncate_prompt_tokens"


def test_a_huge_instruction_is_refused_at_once(golden_server: ServerProcess) -> None:
    """It is not tokenized: not once on the event loop, nor once for each of many inputs."""
    started = time.monotonic()
    for prompt, inputs in (("word " * 600_000, "x"), ("word " * 20_000, ["x"] * 2048)):
        answer = golden_server.embed(input=inputs, prompt=prompt)
        assert answer.status_code == 400
        assert "token" in error_of(answer)["message"]
    assert time.monotonic() - started < 5


def test_a_truncated_instruction_leaves_nothing_to_embed(server: ServerProcess) -> None:
    fields = {"model": "my-embed", "input": "x", "input_type": "query", "truncate_prompt_tokens": 5}
    answer = server.client.post("/v1/embeddings", json=fields)
    assert answer.status_code == 400
    assert "nothing is left to embed" in error_of(answer)["message"]


def test_an_expired_deadline_is_a_504(golden_checkpoint: Path, tmp_path: Path) -> None:
    """The SDK's own time-out passes while another batch runs."""
    options = ("--runner", "tests.server.runners:Hashing")
    env = {"FAKE_SECONDS": "3"}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        with httpx.Client(base_url=server.url, timeout=20) as other:
            first = {"model": "golden-embed", "input": "first"}
            thread = threading.Thread(target=lambda: other.post("/v1/embeddings", json=first))
            thread.start()
            server.wait_for_metric("nv_embed_running_requests", 1)
            answer = server.client.post(
                "/v1/embeddings",
                json={"model": "golden-embed", "input": "second"},
                headers={"x-stainless-read-timeout": "0.2"},
            )
            thread.join()
        assert answer.status_code == 504
        assert answer.headers["x-should-retry"] == "false"
        assert error_of(answer)["code"] == "deadline_exceeded"
        assert server.metric("nv_embed_expired_requests_total") == 1


def test_a_full_queue_refuses_whole_requests(golden_checkpoint: Path, tmp_path: Path) -> None:
    """All or nothing, counted in tokens; the SDKs are told when to come back."""
    options = ("--runner", "tests.server.runners:Hashing", "--max-queued-tokens", "300000")
    env = {"FAKE_SECONDS": "0.3"}
    # 294,000 tokens or so; all different, for equal ones are computed once.
    bulk = {
        "model": "golden-embed",
        "input": [f"{number:04} " + "word " * 140 for number in range(2000)],
    }
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:

        def send_bulk() -> None:
            # It goes away in the end, and frees the queue.
            with contextlib.suppress(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/embeddings", json=bulk, timeout=8)

        thread = threading.Thread(target=send_bulk)
        thread.start()
        server.wait_for_metric("nv_embed_running_requests", 1)
        refused = server.client.post(
            "/v1/embeddings", json={"model": "golden-embed", "input": ["word " * 1000] * 20}
        )
        assert refused.status_code == 429
        assert error_of(refused)["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert int(refused.headers["retry-after-ms"]) >= 1000
        small = server.client.post("/v1/embeddings", json={"model": "golden-embed", "input": "x"})
        assert small.status_code == 200, "there is room for it"
        thread.join()
        server.wait_for_metric("nv_embed_queued_tokens", 0)


def test_half_a_request_does_not_disturb_others(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        fields = {"model": "my-embed", "input": "x"}
        assert server.client.post("/v1/embeddings", json=fields).status_code == 200


def test_metrics_are_there_from_the_start(golden_checkpoint: Path, tmp_path: Path) -> None:
    with serving(
        golden_checkpoint, "--runner", "tests.server.runners:Hashing", log=tmp_path / "log"
    ) as server:
        text = server.client.get("/metrics").text
    for line in (
        'nv_embed_requests_total{route="embeddings",status="200"} 0.0',
        "nv_embed_inputs_total 0.0",
        "nv_embed_tokens_total 0.0",
        "nv_embed_rejected_requests_total 0.0",
        "nv_embed_worker_deaths_total 0.0",
        "nv_embed_workers_ready 1.0",
        "nv_embed_batch_tokens_count 0.0",
        "vllm:num_requests_waiting 0.0",
        "vllm:num_requests_running 0.0",
    ):
        assert f"\n{line}\n" in text, line


def test_openapi_yaml_is_the_apps(server: ServerProcess) -> None:
    """`make openapi` writes it. JSON makes tuples and keys of both sides alike."""
    document = orjson.loads(orjson.dumps(openapi_document()))
    assert yaml.safe_load((ROOT / "openapi.yaml").read_text()) == document
    assert server.client.get("/openapi.json").json() == document


def test_openapi_documents_every_status_of_the_embeddings_route() -> None:
    operation = openapi_document()["paths"]["/v1/embeddings"]["post"]
    assert {int(status) for status in operation["responses"]} == {
        *(200, 400, 401, 404, 405, 408, 413, 415, 429, 431, 500, 503, 504)
    }
