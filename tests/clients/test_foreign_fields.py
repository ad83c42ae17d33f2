"""Fields of this server in other protocols' bodies: honoured, or refused by name, never dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fakes import AppInProcess, in_process

BODIES: dict[str, dict[str, Any]] = {
    "/v1/embed": {"texts": ["x"]},
    "/v2/embed": {"texts": ["x"]},
    "/embed": {"inputs": ["x"]},
    "/": {"inputs": ["x"]},
    "/similarity": {"inputs": {"source_sentence": "x", "sentences": ["y"]}},
    "/api/embed": {"input": ["x"]},
    "/api/embeddings": {"prompt": "x"},
    "/rerank": {"query": "x", "documents": ["y"]},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
    "/v2/rerank": {"query": "x", "documents": ["y"]},
    "/v1/ranking": {"query": {"text": "x"}, "passages": [{"text": "y"}]},
    "/score": {"text_1": "x", "text_2": "y"},
}


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


def message(answer: Any) -> str:
    body = answer.json()
    error = body.get("message") or body.get("error")
    return str(error["message"] if isinstance(error, dict) else error)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_dtype", "int8"),
        ("encoding_format", "base64"),
        ("normalize", False),
        ("messages", [{"role": "user", "content": "x"}]),
        ("extra_body", {"input_type": "query"}),
        ("suffix", "."),
        ("add_special_tokens", False),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    server: AppInProcess, path: str, name: str, value: object
) -> None:
    answer = server.client.post(path, json={**BODIES[path], name: value})
    assert answer.status_code == 400, answer.text
    assert message(answer).startswith(f"{name}: ")


@pytest.mark.parametrize("path", BODIES)
def test_what_changes_nothing_is_not(server: AppInProcess, path: str) -> None:
    harmless = {"normalize": True, "encoding_format": "float", "output_dtype": None, "user": "me"}
    answer = server.client.post(path, json={**BODIES[path], **harmless, "keep_alive": "5m"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-fields"].startswith("keep_alive")


def test_a_field_inside_parameters_counts(server: AppInProcess) -> None:
    for fields in ({"normalize": False}, {"output_dtype": "int8"}):
        answer = server.client.post("/", json={"inputs": "x", "parameters": fields})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("name", ["rank_fields", "max_tokens_per_doc", "max_chunks_per_doc"])
def test_coheres_ways_to_cut_documents(server: AppInProcess, name: str) -> None:
    answer = server.client.post("/v2/rerank", json={**BODIES["/v2/rerank"], name: 10})
    assert (answer.status_code, list(answer.json())) == (400, ["message"])
    assert message(answer).startswith(f"{name}: ")


def test_a_models_suffix_counts_where_no_model_is_needed(server: AppInProcess) -> None:
    query = server.client.post("/embed", json={"inputs": "x", "model": "golden-embed-query"})
    assert query.headers["x-nv-embed-input-type"] == "query"
    assert query.json() == server.client.post("/query/embed", json={"inputs": "x"}).json()
    assert server.client.post("/embed", json={"inputs": "x", "model": "bge"}).status_code == 404


@pytest.mark.parametrize(
    "path", [path for path in BODIES if "rank" not in path and "score" not in path]
)
def test_the_side_before_the_path(server: AppInProcess, path: str) -> None:
    for side in ("query", "passage"):
        answer = server.client.post(f"/{side}{path}", json=BODIES[path])
        assert answer.headers["x-nv-embed-input-type"] == side
