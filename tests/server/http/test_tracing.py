"""Traces: which requests have one, what stands in it and what never does, and where it goes."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, StatusCode

from server.api.request_context import RequestContext, StageTimes, context_of, put_context
from server.errors import OverloadedError, SettingsError
from server.http.trace_export import TraceExport
from server.http.trace_target import export_to, target_of
from server.http.tracing import Tracing
from server.settings import Settings
from tests.server.collector import collecting
from tests.server.fakes import AppInProcess, in_process, logged
from tests.server.processes import free_ports, run_cli, serving
from tests.server.questions import RUNNERS

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
UNSAMPLED = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
STAGES = ["tokenize", "queue", "forward", "write"]
CANARY = "the canary sings at dawn"
KEY = "a-key-that-nobody-guesses"


class Kept:
    """In place of a TraceExport."""

    def __init__(self, ratio: float = 0.0) -> None:
        self.sampler = ParentBasedTraceIdRatio(ratio)
        self.resource, self.scope = Resource({"service.name": "tests"}), None
        self.spans: list[ReadableSpan] = []

    def send(self, spans: list[ReadableSpan]) -> None:
        self.spans += spans

    def only(self) -> ReadableSpan:
        """The request's own span of the one trace."""
        (server,) = [span for span in self.spans if span.kind is SpanKind.SERVER]
        assert all(span.context.trace_id == server.context.trace_id for span in self.spans)
        return server

    def stages(self) -> list[str]:
        return [span.name for span in self.spans if span.kind is not SpanKind.SERVER]


@pytest.fixture(scope="module")
def traced(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    """Callers' sampled traces, and none that begins here."""
    options = {"allow_truncated_dimensions": True, "api_key": [KEY, f"search:{KEY}2"]}
    with in_process(golden_checkpoint, traces=Kept(), **options) as server:
        server.client.headers["authorization"] = f"Bearer {KEY}"
        server.engine.stages = (0.001, 0.002, 0.03)
        server.traces = server.app.user_middleware[1].kwargs["export"]
        yield server


@pytest.fixture
def kept(traced: AppInProcess) -> Kept:
    traced.traces.spans.clear()
    return traced.traces


def test_a_span_of_the_request_and_one_of_each_stage(traced: AppInProcess, kept: Kept) -> None:
    headers = {**SAMPLED, "tracestate": "vendor=1"}
    body = {"input": ["a", "b c"], "dimensions": 32, "encoding_format": "base64"}
    before = time.time_ns()
    answer = traced.client.post("/query/v1/embeddings", json=body, headers=headers)
    assert answer.status_code == 200
    server = kept.only()
    assert (server.name, server.kind) == ("embeddings golden-embed", SpanKind.SERVER)
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.parent.is_remote
    assert server.status.status_code is StatusCode.UNSET
    assert before <= server.start_time < server.end_time <= time.time_ns()
    assert dict(server.attributes) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/embeddings",
        "url.path": "/v1/embeddings",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "gen_ai.operation.name": "embeddings",
        "gen_ai.provider.name": "nv_embed",
        "gen_ai.request.model": "golden-embed",
        "gen_ai.request.encoding_formats": ("base64",),
        "gen_ai.embeddings.dimension.count": 32,
        "gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"],
        "nv_embed.inputs": 2,
    }
    stages = kept.spans[1:]
    assert [span.name for span in stages] == STAGES
    for earlier, span in pairwise(stages):
        assert span.start_time == earlier.end_time
    for span in stages:
        assert span.kind is SpanKind.INTERNAL
        assert span.parent.span_id == server.context.span_id
        assert not span.attributes
    lengths = [(span.end_time - span.start_time) / 1e9 for span in stages]
    assert lengths[:3] == pytest.approx([0.001, 0.002, 0.03], abs=1e-6)
    assert 0 <= lengths[3] < 1
    assert len({span.context.span_id for span in kept.spans}) == 5
    assert {span.context.trace_state.to_header() for span in kept.spans} == {"vendor=1"}


@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        ("/v1/embeddings", {"input": "a"}, "embeddings"),
        ("/openai/deployments/golden-embed/embeddings", {"input": "a"}, "embeddings"),
        ("/v2/embed", {"texts": ["a"], "model": "golden-embed"}, "embeddings"),
        ("/embed", {"inputs": "a"}, "embeddings"),
        ("/passage", {"inputs": "a"}, "embeddings"),
        ("/api/embed", {"input": "a", "model": "golden-embed"}, "embeddings"),
        ("/rerank", {"query": "a", "documents": ["b"]}, "rerank"),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "rerank"),
        ("/similarity", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, "rerank"),
        ("/tokenize", {"input": "a"}, None),
    ],
)
def test_each_route_has_a_span(
    traced: AppInProcess, kept: Kept, path: str, body: dict, operation: str | None
) -> None:
    answer = traced.client.post(path, json=body, headers=SAMPLED)
    assert answer.status_code == 200, answer.text
    server = kept.only()
    assert server.name == (f"{operation} golden-embed" if operation else "POST /tokenize")
    assert server.attributes.get("gen_ai.operation.name") == operation
    assert kept.stages() == (STAGES if operation else ["tokenize", "write"])
    assert server.attributes["gen_ai.usage.input_tokens"] > 0
    has_dimensions = "gen_ai.embeddings.dimension.count" in server.attributes
    assert has_dimensions == (operation == "embeddings")


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "name", "route"),
    [
        ("GET", "/v1/models", b"", 200, "GET /v1/models", "/v1/models"),
        ("GET", "/v1/models/golden-embed", b"", 200, None, "/v1/models/{model_id:path}"),
        ("POST", "/v1/embeddings", b"{", 400, "embeddings golden-embed", "/v1/embeddings"),
        ("GET", f"/{KEY}", b"", 404, "GET", None),
        ("DELETE", "/v1/models", b"", 405, "DELETE /v1/models", "/v1/models"),
    ],
)
def test_what_is_refused_or_embeds_nothing_has_a_span_alone(
    traced: AppInProcess,
    kept: Kept,
    method: str,
    path: str,
    content: bytes,
    status: int,
    name: str | None,
    route: str | None,
) -> None:
    answer = traced.client.request(method, path, content=content, headers=SAMPLED)
    assert answer.status_code == status
    server = kept.only()
    assert len(kept.spans) == 1
    assert server.name == (name or f"GET {route}")
    assert server.attributes.get("http.route") == route
    assert server.attributes.get("url.path") == (None if "{" in (route or "{") else route)
    assert server.attributes["http.response.status_code"] == status
    assert server.attributes.get("error.type") == (str(status) if status >= 400 else None)
    assert server.status.status_code is StatusCode.UNSET, "the client's mistake is not ours"


def test_overload_is_no_fault_of_the_server(traced: AppInProcess, kept: Kept) -> None:
    traced.engine.error = OverloadedError("full", retry_after=1)
    try:
        answer = traced.client.post("/v1/embeddings", json={"input": "a"}, headers=SAMPLED)
    finally:
        traced.engine.error = None
    assert answer.status_code == 429
    assert kept.only().attributes["error.type"] == "429"
    assert kept.only().status.status_code is StatusCode.UNSET
    assert kept.stages() == []


def test_a_failure_is_one_and_its_traceback_can_be_found(golden_checkpoint: Path) -> None:
    kept = Kept()
    with in_process(golden_checkpoint, traces=kept, tracebacks=1) as server:
        server.engine.error = RuntimeError("x")
        answer = server.client.post("/v1/embeddings", json={"input": "a"}, headers=SAMPLED)
        assert answer.status_code == 500
        (line,) = [line for line in server.log.splitlines() if "a request failed" in line]
    assert f"trace_id={TRACE}" in line
    assert kept.only().attributes["error.type"] == "500"
    assert kept.only().status.status_code is StatusCode.ERROR


def test_no_text_and_no_key_is_in_any_span(traced: AppInProcess, kept: Kept) -> None:
    asks: list[tuple[str, Any, dict[str, str], int]] = [
        ("/v1/embeddings", {"input": CANARY, "user": CANARY}, {}, 200),
        ("/v1/embeddings", {"input": CANARY, "instruction": CANARY}, {}, 200),
        ("/v1/embeddings", {"input": CANARY, "model": CANARY}, {}, 404),
        ("/v1/embeddings", {"input": CANARY, CANARY: 1, "dimensions": 1000}, {}, 400),
        ("/v1/embeddings", {"input": CANARY}, {"authorization": f"Bearer {CANARY}"}, 401),
        ("/v1/embeddings", {"input": CANARY}, {"authorization": f"Bearer {KEY}2"}, 200),
        ("/v1/embeddings", {"input": CANARY}, {"x-request-id": KEY, "user-agent": CANARY}, 200),
        (f"/v1/embeddings?api_key={KEY}&text={CANARY}", {"input": CANARY}, {}, 200),
        (f"/openai/deployments/{CANARY}/embeddings", {"input": CANARY}, {}, 404),
        ("/rerank", {"query": CANARY, "documents": [CANARY], "return_documents": True}, {}, 200),
        (f"/v1/{KEY}/{CANARY}", {}, {}, 404),
    ]
    for path, body, headers, status in asks:
        answer = traced.client.post(path, json=body, headers={**SAMPLED, **headers})
        assert answer.status_code == status, answer.text
    assert traced.client.get(f"/v1/models/{CANARY}", headers=SAMPLED).status_code == 404
    assert len([span for span in kept.spans if span.kind is SpanKind.SERVER]) == len(asks) + 1
    sent = encode_spans(kept.spans).SerializeToString()
    assert b"/v1/embeddings" in sent
    for secret in (b"canary", b"sings", KEY.encode()):
        assert secret not in sent


def test_an_unsampled_trace_has_its_id_in_the_log_alone(traced: AppInProcess, kept: Kept) -> None:
    answer = traced.client.post("/v1/embeddings", json={"input": "a"}, headers=UNSAMPLED)
    assert answer.status_code == 200
    assert kept.spans == []
    line = traced.log.splitlines()[-1]
    assert f"trace_id={TRACE}" in line
    assert answer.headers["x-request-id"] in line


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "nonsense",
        f"00-{TRACE}-{PARENT}",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}\xff-{PARENT}-01",
        f"01-{TRACE}-{PARENT}-01-{'x' * 512}",
    ],
)
def test_a_malformed_parent_is_none(traced: AppInProcess, kept: Kept, malformed: str) -> None:
    """The trace begins here; and here none is sampled unless its caller says so."""
    headers = {"traceparent": malformed.encode("latin-1"), "tracestate": b"a=1"}
    assert traced.client.get("/v1/models", headers=headers).status_code == 200
    assert kept.spans == []
    last = traced.log.splitlines()[-1]
    assert "trace_id=" in last
    assert TRACE not in last


@pytest.mark.parametrize(
    ("parent", "states", "state"),
    [
        (f" 00-{TRACE}-{PARENT}-01\t", [], ""),
        (f"cc-{TRACE}-{PARENT}-03-what-will-be", ["a=1"], "a=1"),
        (f"00-{TRACE}-{PARENT}-01", ["a=1,b=2", "c=3"], "a=1,b=2,c=3"),
        (f"00-{TRACE}-{PARENT}-01", ["nonsense"], ""),
        (f"00-{TRACE}-{PARENT}-01", [f"a={'x' * 600}"], ""),
    ],
)
def test_what_a_right_parent_may_look_like(
    traced: AppInProcess,
    kept: Kept,
    caplog: pytest.LogCaptureFixture,
    parent: str,
    states: list[str],
    state: str,
) -> None:
    headers = [("traceparent", parent), *(("tracestate", one) for one in states)]
    assert traced.client.get("/v1/models", headers=headers).status_code == 200
    server = kept.only()
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == PARENT
    assert server.context.trace_state.to_header() == state
    assert {record.name for record in caplog.records} == {"nv_embed.access"}


def test_probes_have_no_trace(traced: AppInProcess, kept: Kept) -> None:
    for path in ("/metrics", "/health", "/livez", "/readyz", "/ping"):
        assert traced.client.get(path, headers=SAMPLED).status_code == 200
    assert kept.spans == []


def test_a_share_of_the_traces_that_begin_here_is_sampled(golden_checkpoint: Path) -> None:
    kept = Kept(0.5)
    with in_process(golden_checkpoint, traces=kept, log_format="json") as server:
        for _ in range(200):
            server.client.get("/v1/models")
        logged_ids = [orjson.loads(line)["trace_id"] for line in server.log.splitlines()]
    assert 60 < len(kept.spans) < 140
    assert all(span.parent is None for span in kept.spans)
    sampled = [f"{span.context.trace_id:032x}" for span in kept.spans]
    assert len(set(logged_ids)) == 200
    assert [one for one in logged_ids if one in set(sampled)] == sampled


def test_without_traces_there_is_no_layer(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint) as server:
        assert Tracing not in [layer.cls for layer in server.app.user_middleware]
        server.client.post("/v1/embeddings", json={"input": "a"}, headers=SAMPLED)
        assert "trace_id" not in server.log


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_is_sent_in_pieces_is_written_while_it_is_sent(pieces: int) -> None:
    """One piece is written before it is sent, and the sending is in no stage."""
    kept, slow = Kept(1.0), 0.05

    async def app(scope: Any, receive: Any, send: Any) -> None:
        times = context_of(scope).times
        assert isinstance(times, StageTimes)
        times.add((0.0, 0.0, 0.0))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(pieces):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(message: Any) -> None:
        await asyncio.sleep(slow if message.get("body") else 0)

    scope = {"type": "http", "method": "GET", "scheme": "http", "http_version": "1.1", "path": "/x"}
    put_context(scope, RequestContext("id", {}, "/x", None))
    layer = Tracing(app, export=kept, model="m", dimensions=1, paths=frozenset())
    asyncio.run(layer(scope, None, send))
    server, write = kept.only(), kept.spans[-1]
    assert write.name == "write"
    assert (server.end_time - server.start_time) / 1e9 >= pieces * slow
    seconds = (write.end_time - write.start_time) / 1e9
    if pieces == 1:
        assert seconds < slow
    else:
        assert (pieces - 1) * slow <= seconds < (server.end_time - server.start_time) / 1e9


# Where they go


ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"


@pytest.mark.parametrize(
    ("option", "environment", "url"),
    [
        (None, {}, None),
        (None, {ENDPOINT: "", TRACES: ""}, None),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("https://c/base/", {}, "https://c/base/v1/traces"),
        ("http://c:4318/v1/traces", {}, "http://c:4318/v1/traces"),
        (None, {ENDPOINT: "http://c:4318/"}, "http://c:4318/v1/traces"),
        (None, {ENDPOINT: "http://c:4318", TRACES: "http://t/own"}, "http://t/own"),
        ("http://mine:1", {TRACES: "http://t/own"}, "http://mine:1/v1/traces"),
        (None, {ENDPOINT: "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, None),
        (
            None,
            {ENDPOINT: "http://c", "OTEL_TRACES_EXPORTER": "console, otlp"},
            "http://c/v1/traces",
        ),
        ("http://c:4318", {"OTEL_SDK_DISABLED": "true"}, None),
        (
            "http://c:4318",
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "http://c:4318/v1/traces",
        ),
    ],
)
def test_which_endpoint_counts(
    option: str | None, environment: dict[str, str], url: str | None
) -> None:
    target = target_of(Settings(otlp_endpoint=option), environment)
    assert (target.url if target else None) == url


@pytest.mark.parametrize("value", ["collector:4318", "ftp://c", "http://", "http://a b", "4318"])
def test_an_endpoint_is_a_url(value: str) -> None:
    with pytest.raises(ValueError, match=r"must be a URL, as in http://collector:4318"):
        Settings(otlp_endpoint=value)


@pytest.mark.process
def test_another_protocol_stops_the_start(golden_checkpoint: Path) -> None:
    env = {ENDPOINT: "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}
    result = run_cli("serve", "--model", str(golden_checkpoint), "--device", "cpu", env=env)
    assert result.returncode == 2
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: traces are sent as http/protobuf" in result.stderr
    assert "listening" not in result.stderr


def test_without_the_packages_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.http.trace_export")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    settings = Settings(otlp_endpoint="http://127.0.0.1:1")
    target = target_of(settings, {})
    assert target is not None
    with pytest.raises(SettingsError) as caught:
        export_to(target, settings)
    assert f"{caught.value}".startswith("--otlp-endpoint: traces need packages")
    assert "install 'opentelemetry-exporter-otlp-proto-http" in f"{caught.value}"
    assert "'opentelemetry-sdk" in f"{caught.value}"


@pytest.mark.parametrize(
    ("ratio", "environment", "sampler"),
    [
        (None, {}, "ParentBased{root:TraceIdRatioBased{0.01}"),
        (0.25, {"OTEL_TRACES_SAMPLER": "always_on"}, "ParentBased{root:TraceIdRatioBased{0.25}"),
        (None, {"OTEL_TRACES_SAMPLER": "always_on"}, "AlwaysOnSampler"),
        (
            None,
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"},
            "TraceIdRatioBased{0.5}",
        ),
    ],
)
def test_which_sampler_counts(
    monkeypatch: pytest.MonkeyPatch,
    ratio: float | None,
    environment: dict[str, str],
    sampler: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    export = TraceExport("http://127.0.0.1:1/v1/traces", ratio)
    assert export.sampler.get_description().startswith(sampler)
    export.close()


def test_who_sends_them_is_said_and_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def resource() -> dict[str, Any]:
        export = TraceExport("http://127.0.0.1:1/v1/traces", 1.0)
        export.close()
        return dict(export.resource.attributes)

    assert resource()["service.name"] == "nv-embed-server"
    monkeypatch.setattr(sys, "orig_argv", ["nv-embed", "serve", "--api-key", KEY])
    monkeypatch.setenv("OTEL_SERVICE_NAME", "search-embeddings")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test,service.version=9")
    monkeypatch.setenv("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "otel,process")
    found = resource()
    assert found["service.name"] == "search-embeddings"
    assert found["deployment.environment"] == "test"
    assert found["service.version"] == "9"
    assert found["process.pid"] == os.getpid()
    assert KEY not in f"{found}"


def test_what_the_sdk_does_not_take_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    with pytest.raises(SettingsError, match=r"OTEL_.*max_export_batch_size"):
        TraceExport("http://127.0.0.1:1/v1/traces", 1.0)


def a_span() -> ReadableSpan:
    kept = Kept(1.0)

    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    scope = {"type": "http", "method": "GET", "scheme": "http", "http_version": "1.1", "path": "/x"}
    put_context(scope, RequestContext("id", {}, "/x", None))
    layer = Tracing(app, export=kept, model="m", dimensions=1, paths=frozenset())
    asyncio.run(layer(scope, None, None))
    assert kept.only().attributes["http.response.status_code"] == 499, "nobody was answered"
    return kept.only()


def test_a_collector_that_refuses_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is said when it takes them again. Its address may hold a password."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    with collecting() as collector, logged() as log:
        collector.status = 401
        url = collector.url.replace("//", f"//user:{KEY}@")
        export = TraceExport(f"{url}/v1/traces?token={KEY}", 1.0)
        deadline = time.monotonic() + 10
        while "traces are lost" not in log.getvalue() and time.monotonic() < deadline:
            export.send([a_span()])
            time.sleep(0.03)
        for _ in range(3):
            export.send([a_span()])
            time.sleep(0.05)
        collector.status = 200
        while "takes traces again" not in log.getvalue() and time.monotonic() < deadline:
            export.send([a_span()])
            time.sleep(0.03)
        export.close()
    lines = log.getvalue().splitlines()
    assert len(lines) == 3, lines
    assert f"traces go to {collector.url}: 1 of them" in lines[0]
    assert f"traces are lost, for {collector.url} does not take them: it answers 401" in lines[1]
    assert f"{collector.url} takes traces again" in lines[2]
    assert KEY not in log.getvalue()


def test_a_collector_that_never_answers_does_not_hold_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, logged() as log:
        export = TraceExport(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces", 1.0)
        export.send([a_span()])
        began = time.monotonic()
        export.close()
        assert time.monotonic() - began < 4
    assert log.getvalue().count("the last traces were not taken") == 1


# All of it


@pytest.mark.process
def test_a_collector_gets_the_spans_of_a_real_server(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """The last of them when it stops: nothing is sent before, for the queue waits 5 s."""
    key_file = tmp_path / "keys"
    key_file.write_text(f"{KEY}\n")
    key_file.chmod(0o600)
    env = {"FAKE_SECONDS": "0.2", "OTEL_SERVICE_NAME": "search"}
    options = ("--runner", f"{RUNNERS}Hashing", "--api-key-file", str(key_file))
    with collecting() as collector:
        options += ("--otlp-endpoint", collector.url, "--trace-sample", "0")
        with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
            server.client.headers["authorization"] = f"Bearer {KEY}"
            ask = {"model": "golden-embed", "input": CANARY}
            for headers in ({}, UNSAMPLED, SAMPLED):
                answer = server.client.post("/v1/embeddings", json=ask, headers=headers)
                assert answer.status_code == 200
            assert server.says(f"trace_id={TRACE}"), server.log
        assert collector.paths == ["/v1/traces"]
    assert collector.resource["service.name"] == "search"
    spans = collector.spans
    assert [span.name for span in spans] == ["embeddings golden-embed", *STAGES]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    request, *stages = spans
    assert request.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in stages} == {request.span_id}

    def seconds(span: Any) -> float:
        return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9

    assert 0.9 <= sum(map(seconds, stages)) / seconds(request) <= 1
    assert seconds(stages[2]) >= 0.2
    assert request.start_time_unix_nano <= stages[0].start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= request.end_time_unix_nano
    for body in collector.bodies:
        assert b"canary" not in body
        assert KEY.encode() not in body


@pytest.mark.process
def test_a_collector_that_is_gone_harms_nobody(golden_checkpoint: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer {KEY}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.1",
        "OTEL_BSP_SCHEDULE_DELAY": "20",
        "OTEL_TRACES_SAMPLER": "always_on",
    }
    options = ("--runner", f"{RUNNERS}Hashing")
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        for pid in server.worker_pids():
            assert KEY not in Path(f"/proc/{pid}/environ").read_bytes().decode()
        for _ in range(20):
            began = time.monotonic()
            assert server.embed(input="x").status_code == 200
            time.sleep(max(0.0, 0.03 - (time.monotonic() - began)))
        assert server.says("traces are lost"), server.log
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 5
    assert server.log.count("traces are lost") == 1
    assert "does not answer" in server.log
    for said in ("Failed to export", "Transient error", "Queue full", "http/protobuf"):
        assert said not in server.log
    assert KEY not in server.log
