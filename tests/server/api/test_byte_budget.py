"""Bytes that all requests together may hold."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from server.api.byte_budget import ByteBudget, ByteBudgetError
from tests.server.fakes import in_process


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


def test_too_many_bytes_in_flight_are_a_429(golden_checkpoint: Path) -> None:
    inputs = ["x"] * 20  # 64 values each: 21,760 bytes as floats
    with in_process(golden_checkpoint, max_inflight_bytes=30_000) as server:
        server.engine.open.clear()
        statuses: list[int] = []

        def send() -> None:
            statuses.append(server.embed(input=inputs).status_code)

        thread = threading.Thread(target=send)
        thread.start()
        server.wait_until(lambda: bool(server.engine.jobs), "held by the engine")
        with server.new_client() as other:
            body = {"model": "golden-embed", "input": inputs}
            refused = other.post("/v1/embeddings", json=body)
        assert refused.status_code == 429
        assert refused.headers["retry-after-ms"] == "1000"
        assert "bytes" in refused.json()["error"]["message"]
        assert len(server.engine.jobs) == 1
        server.call(server.engine.open.set)
        thread.join()
        assert statuses == [200]
        assert server.embed(input=inputs).status_code == 200
        assert server.metric('nv_embed_refused_requests_total{reason="bytes"}') == 1
        assert server.metric("nv_embed_refused_requests_total") == 1
        # Those that got vectors, and not the one that was refused.
        assert server.metric("nv_embed_request_duration_seconds_count") == 2
        assert server.metric("nv_embed_serialize_duration_seconds_count") == 2
