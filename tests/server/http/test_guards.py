"""What bounds and protects: bytes in flight, stuck workers, endpoints that can be closed, TLS."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from server.api.byte_budget import ByteBudget, ByteBudgetError
from tests.server.processes import ServerProcess, serving

FAKE = ("--runner", "tests.server.runners:Hashing")


def test_the_byte_budget_is_shared_and_given_back() -> None:
    budget = ByteBudget(100)
    with budget.reservation() as first:
        first.add(60)
        with budget.reservation() as second:
            second.add(40)
            with pytest.raises(ByteBudgetError):
                second.add(1)
        first.add(40)
        assert budget.used == 100
    assert budget.used == 0


def test_a_request_alone_may_exceed_the_budget() -> None:
    budget = ByteBudget(100)
    with budget.reservation() as alone:
        alone.add(90)
        alone.add(90)
        with budget.reservation() as other, pytest.raises(ByteBudgetError):
            other.add(1)
    assert budget.used == 0


def test_too_many_bytes_in_flight_are_a_429(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*FAKE, "--max-inflight-bytes", "30000")
    env = {"FAKE_SECONDS": "2"}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        inputs = ["x"] * 20  # 64 values each: 21,760 bytes as floats

        def send() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as other:
                other.post("/v1/embeddings", json={"model": "golden-embed", "input": inputs})

        thread = threading.Thread(target=send)
        thread.start()
        server.wait_for_metric("nv_embed_running_requests", 1)
        refused = server.embed(input=inputs)
        assert refused.status_code == 429
        assert refused.headers["retry-after-ms"] == "1000"
        assert "bytes" in refused.json()["error"]["message"]
        thread.join()
        assert server.embed(input=inputs).status_code == 200


def test_readiness_is_red_while_no_worker_answers(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*FAKE, "--hang-timeout", "4")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        assert server.embed(input="measured").status_code == 200
        (worker,) = server.worker_pids()
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(server.embed(input="x").status_code)
        )
        os.kill(worker, signal.SIGSTOP)
        thread.start()
        with httpx.Client(base_url=server.url, timeout=10) as probe:
            server.wait_until(
                lambda: "no worker has answered lately" in probe.get("/readyz").text, "red"
            )
            assert probe.get("/livez").status_code == 200
        thread.join()
        assert statuses == [200], "another worker served it"
        server.wait_ready()


def test_docs_and_metrics_can_be_closed(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*FAKE, "--no-docs", "--metrics-need-key", "--api-key", "secret")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        key = {"authorization": "Bearer secret"}
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert server.client.get(path, headers=key).status_code == 404
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/metrics", headers=key).status_code == 200
        assert server.client.get("/readyz").status_code == 200


def test_a_proxy_that_strips_a_prefix(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*FAKE, "--root-path", "/api", "--api-key", "secret")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        for path in ("/livez", "/readyz", "/metrics"):
            assert server.client.get(path).status_code == 200, path
        body = {"model": "golden-embed", "input": "a"}
        assert server.client.post("/v1/embeddings", json=body).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert server.client.post("/v1/embeddings", json=body, headers=key).status_code == 200
        assert 'nv_embed_requests_total{route="embeddings",status="200"} 1.0' in (
            server.client.get("/metrics").text
        )
        schema = server.client.get("/openapi.json", headers=key).json()
        assert schema["servers"] == [{"url": "/api"}]


def test_a_proxy_that_leaves_the_prefix(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Probes are open, keys are asked for, and all is counted, with the prefix and without."""
    options = (*FAKE, "--root-path", "/nv", "--api-key", "secret")
    key = {"authorization": "Bearer secret"}
    body = {"model": "golden-embed", "input": "a"}
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        for path in ("/nv/livez", "/nv/readyz", "/nv/health", "/nv/metrics", "/livez"):
            assert server.client.get(path).status_code == 200, path
        for path in ("/nv/info", "/nv/nv/livez", "/nvlivez", "/nv", "/nv/", "/nv//livez"):
            assert server.client.get(path).status_code == 401, path
        for path in ("/nv/v1/embeddings", "/v1/embeddings"):
            assert server.client.post(path, json=body).status_code == 401
            assert server.client.post(path, json=body, headers=key).status_code == 200
        assert server.client.get("/nv/v1/models", headers=key).status_code == 200
        assert server.client.get("/nv/livez/", headers=key).status_code == 404
        metrics = server.client.get("/nv/metrics").text
        assert 'nv_embed_requests_total{route="embeddings",status="200"} 2.0' in metrics
        assert 'nv_embed_requests_total{route="models",status="200"} 1.0' in metrics
        assert "GET /nv/livez 200" not in server.log, "probes are not worth a line"
        page = server.client.get("/nv/docs", headers=key).text
        assert "/nv/openapi.json" in page


def test_tls(golden_checkpoint: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
        f"-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout {key} "
        f"-out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    options = (*FAKE, "--tls-certificate", str(certificate), "--tls-key", str(key))
    trusted = ssl.create_default_context(cafile=str(certificate))
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log", verify=trusted)
    try:
        assert server.url.startswith("https://")
        server.wait_ready()
        assert server.embed(input="x").status_code == 200
    finally:
        assert server.stop() == 0
