"""What clients that rank send, and what they read of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.server.fakes import AppInProcess, in_process

QUERY, TEXTS = "when is lunch served?", ["Lunch is at noon.", "wizards vex"]
LONG = "word " * 40_000
VOYAGE = (
    b'{"query": "when is lunch served?", "documents": ["Lunch is at noon.", "wizards vex"], '
    b'"model": "golden-embed", "top_k": null, "truncation": true}'
)
NIM = (
    b'{"model": "golden-embed", "query": {"text": "when is lunch served?"}, "passages": '
    b'[{"text": "Lunch is at noon."}, {"text": "wizards vex"}], "truncate": "END"}'
)
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


@pytest.fixture(scope="module")
def cosines(server: AppInProcess) -> list[float]:
    """By OpenAI's route."""
    sides = []
    for side, texts in (("query", [QUERY]), ("passage", TEXTS)):
        answer = server.client.post("/v1/embeddings", json={"input": texts, "input_type": side})
        sides.append(np.array([row["embedding"] for row in answer.json()["data"]]))
    return [float(score) for score in sides[1] @ sides[0][0]]


def test_voyages_client_reads_data(server: AppInProcess, cosines: list[float]) -> None:
    found = server.client.post("/v1/rerank", content=VOYAGE, headers=JSON).json()
    for row in found["data"]:
        assert row["relevance_score"] == pytest.approx(cosines[row["index"]], abs=1e-6)
    assert found["usage"]["total_tokens"] > 0
    few = VOYAGE.replace(b"null", b"1")
    assert len(server.client.post("/v1/rerank", content=few, headers=JSON).json()["data"]) == 1


@pytest.mark.parametrize("path", ["/v1/ranking", "/v1/retrieval/golden-embed/reranking"])
def test_nims_rankings(server: AppInProcess, cosines: list[float], path: str) -> None:
    answer = server.client.post(path, content=NIM, headers=JSON)
    rankings = answer.json()["rankings"]
    assert [row["logit"] for row in rankings] == sorted(
        (r["logit"] for r in rankings), reverse=True
    )
    for row in rankings:
        assert row["logit"] == pytest.approx(cosines[row["index"]], abs=1e-6)
    assert answer.headers["x-nv-embed-score"] == "cosine"
    metrics = server.client.get("/metrics").text
    assert 'nv_embed_requests_total{route="rerank",status="200"}' in metrics


def test_teis_rerank_has_its_shape_and_its_default(server: AppInProcess) -> None:
    body = {"query": QUERY, "texts": ["x", LONG], "raw_scores": False, "return_text": False}
    refused = server.client.post("/rerank", json=body)
    assert refused.status_code == 400
    assert refused.json()["error_type"] == "Validation"
    assert "texts[1]" in refused.json()["error"]
    cut = server.client.post(
        "/rerank", json={**body, "truncate": True, "truncation_direction": "Left"}
    )
    assert [row.keys() for row in cut.json()] == [{"index", "score"}] * 2
    assert cut.headers["x-nv-embed-truncated"] == "texts[1]"


def test_the_headers_say_which_were_cut(server: AppInProcess) -> None:
    answer = server.client.post(
        "/v2/rerank", json={"query": LONG, "documents": ["x", LONG, LONG, "y"]}
    )
    assert answer.headers["x-nv-embed-truncated"] == "query, documents[1-2]"
    assert answer.headers["x-nv-embed-input-type"] == "mixed"
    assert answer.headers["x-nv-embed-fingerprint"]
    pairs = {"text_1": ["x", LONG], "text_2": ["y", LONG]}
    scored = server.client.post("/score", json=pairs)
    assert scored.headers["x-nv-embed-truncated"] == "text_1[1], text_2[1]"
