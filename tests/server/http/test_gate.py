"""What needs a key, what can be closed, and a proxy in front: the app in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import SettingsError
from tests.server.fakes import in_process


def test_docs_and_metrics_can_be_closed(golden_checkpoint: Path) -> None:
    options = {"docs": False, "metrics_need_key": True, "api_key": ["secret"]}
    with in_process(golden_checkpoint, **options) as server:
        key = {"authorization": "Bearer secret"}
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert server.client.get(path, headers=key).status_code == 404
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/metrics", headers=key).status_code == 200
        assert server.client.get("/readyz").status_code == 200


def test_a_proxy_that_strips_a_prefix(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, root_path="/api", api_key=["secret"]) as server:
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


def test_a_proxy_that_leaves_the_prefix(golden_checkpoint: Path) -> None:
    """Probes are open, keys are asked for, and all is counted, with the prefix and without."""
    key = {"authorization": "Bearer secret"}
    body = {"model": "golden-embed", "input": "a"}
    with in_process(golden_checkpoint, root_path="/nv", api_key=["secret"]) as server:
        for path in ("/nv/livez", "/nv/readyz", "/nv/health", "/nv/metrics", "/livez"):
            assert server.client.get(path).status_code == 200, path
        for path in ("/nv/info", "/nv/nv/livez", "/nvlivez", "/nv", "/nv//livez"):
            assert server.client.get(path).status_code == 401, path
        for path in ("/nv/v1/embeddings", "/v1/embeddings"):
            assert server.client.post(path, json=body).status_code == 401
            assert server.client.post(path, json=body, headers=key).status_code == 200
        assert server.client.get("/nv/v1/models", headers=key).status_code == 200
        assert server.client.get("/nv/livez/").status_code == 200
        metrics = server.client.get("/nv/metrics").text
        assert 'nv_embed_requests_total{route="embeddings",status="200"} 2.0' in metrics
        assert 'nv_embed_requests_total{route="models",status="200"} 1.0' in metrics
        assert "GET /nv/livez 200" not in server.log, "probes are not worth a line"
        schema = server.client.get("/nv/openapi.json", headers=key).json()
        assert schema["servers"] == [{"url": "/nv"}]


def test_a_key_s_name_stands_in_the_log_and_the_key_does_not(golden_checkpoint: Path) -> None:
    keys = ["search:key-of-search", "bulk:key-of-bulk", "key-of-nobody"]
    body = {"model": "golden-embed", "input": "a"}
    with in_process(golden_checkpoint, api_key=keys) as server:
        for key in ("key-of-bulk", "key-of-search", "key-of-nobody"):
            headers = {"authorization": f"Bearer {key}"}
            assert server.client.post("/v1/embeddings", json=body, headers=headers).is_success
        for wrong in ("search", "search:key-of-search", "bulk:key-of-search"):
            headers = {"authorization": f"Bearer {wrong}"}
            assert server.client.post("/v1/embeddings", json=body, headers=headers).is_client_error
        assert server.engine.key_names == ["bulk", "search", ""]
        lines = [line.partition(" key=") for line in server.log.splitlines() if " 200 " in line]
        assert [name.split(" ")[0] for _, _, name in lines] == ["bulk", "search", ""]
        assert "key-of" not in server.log


def test_shares_of_the_queue_need_keys_with_names(golden_checkpoint: Path) -> None:
    with (
        pytest.raises(SettingsError, match="--max-key-share needs keys with names"),
        in_process(golden_checkpoint, api_key=["key-of-nobody"], max_key_share=0.5),
    ):
        pass
