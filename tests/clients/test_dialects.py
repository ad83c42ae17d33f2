"""Other servers' protocols as their clients speak them: requests, answers, errors."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.fakes import AppInProcess, in_process

TEXTS = ["when is lunch served?", "wizards vex", "a"]
LONG = "word " * 40_000


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


@pytest.fixture(scope="module")
def vectors(server: AppInProcess) -> dict[str, np.ndarray]:
    """By side, from OpenAI's route."""
    found = {}
    for side in ("none", "query", "passage"):
        fields = {} if side == "none" else {"input_type": side}
        answer = server.client.post("/v1/embeddings", json={"input": TEXTS, **fields})
        found[side] = np.array([row["embedding"] for row in answer.json()["data"]])
    return found


def post(server: AppInProcess, path: str, **body: Any) -> httpx.Response:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-nv-embed-fingerprint"]
    return answer


def same(found: object, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.array(found), expected, atol=1e-6)


# Cohere


def test_cohere_v2(server: AppInProcess, vectors: dict[str, np.ndarray]) -> None:
    for input_type, side in (("search_document", "passage"), ("search_query", "query")):
        body = {"texts": TEXTS, "model": "golden-embed", "embedding_types": ["float"]}
        answer = post(server, "/v2/embed", **body, input_type=input_type)
        assert answer.headers["x-nv-embed-input-type"] == side
        found = answer.json()
        same(found["embeddings"]["float"], vectors[side])
        assert found["texts"] == TEXTS
        assert found["response_type"] == "embeddings_by_type"
        assert found["meta"]["api_version"] == {"version": "2"}
        assert found["meta"]["billed_units"]["input_tokens"] > 3
        assert "warnings" not in found["meta"]


def test_coheres_types_come_together(server: AppInProcess, vectors: dict[str, np.ndarray]) -> None:
    kinds = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    found = post(
        server, "/v2/embed", texts=TEXTS, input_type="search_document", embedding_types=kinds
    ).json()["embeddings"]
    assert list(found) == kinds
    exact = vectors["passage"]
    same(found["float"], exact)
    np.testing.assert_allclose(found["int8"], np.rint(exact * 127), atol=1.01)
    np.testing.assert_array_equal(np.array(found["uint8"]) - 128, found["int8"])
    bits = np.packbits(exact > 0, axis=1).astype(int)
    np.testing.assert_array_equal(found["ubinary"], bits)
    np.testing.assert_array_equal(found["binary"], bits - 128)
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in found["base64"]]
    same(decoded, exact)


def test_cohere_v1_is_a_bare_list_without_types(
    server: AppInProcess, vectors: dict[str, np.ndarray]
) -> None:
    body = {"texts": TEXTS, "input_type": "search_query", "truncate": None}
    found = post(server, "/v1/embed", **body, embedding_types=None).json()
    same(found["embeddings"], vectors["query"])
    assert found["response_type"] == "embeddings_floats"
    typed = post(server, "/v1/embed", **body, embedding_types=["float"]).json()
    same(typed["embeddings"]["float"], vectors["query"])


def test_cohere_cuts_unless_told_otherwise(server: AppInProcess) -> None:
    body = {"texts": ["x", LONG], "model": "golden-embed", "input_type": "classification"}
    answer = post(server, "/v2/embed", **body)
    assert answer.headers["x-nv-embed-truncated"] == "1"
    assert answer.json()["meta"]["warnings"] == ["texts were truncated, by index: 1"]
    refused = server.client.post("/v2/embed", json={**body, "truncate": "NONE"})
    assert refused.status_code == 400
    assert refused.json().keys() == {"message"}
    assert "texts[1]" in refused.json()["message"]


def test_cohere_tells_the_texts_again_in_pieces(server: AppInProcess) -> None:
    texts = [f"{number} " + 'ü"' * 9000 for number in range(60)]
    answer = post(server, "/v1/embed", texts=texts, input_type="clustering", max_tokens=64)
    assert answer.json()["texts"] == texts
    assert len(answer.json()["embeddings"]) == 60


def test_coheres_inputs(server: AppInProcess, vectors: dict[str, np.ndarray]) -> None:
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    found = post(server, "/v2/embed", inputs=inputs, input_type="search_query").json()
    same(found["embeddings"]["float"], vectors["query"])


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"texts": TEXTS, "images": ["data:image/png;base64,AAAA"]}, "images"),
        ({"input_type": "search_query"}, "texts"),
        ({"texts": "one"}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": [""]}, "texts"),
        ({"texts": TEXTS, "embedding_types": ["float64"]}, "embedding_types"),
        ({"texts": TEXTS, "output_dimension": 7}, "7 cannot be had"),
        ({"texts": TEXTS, "input_type": "image"}, "input_type"),
        ({"inputs": [{"content": [{"type": "image_url"}]}]}, "inputs[0]"),
    ],
    ids=str,
)
def test_cohere_reads_its_own_errors(server: AppInProcess, body: dict[str, Any], word: str) -> None:
    for path in ("/v1/embed", "/v2/embed"):
        answer = server.client.post(path, json=body)
        assert answer.status_code == 400
        assert word in answer.json()["message"]
    unknown = server.client.post("/v2/embed", json={"texts": TEXTS, "model": "embed-v4"})
    assert (unknown.status_code, list(unknown.json())) == (404, ["message"])


# TEI and Hugging Face


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_tei(server: AppInProcess, vectors: dict[str, np.ndarray], path: str) -> None:
    same(post(server, path, inputs=TEXTS, truncate=True).json(), vectors["none"])
    same(post(server, path, inputs=TEXTS[0]).json(), vectors["none"][:1])
    same(post(server, f"/query{path}", inputs=TEXTS).json(), vectors["query"])
    body = {"inputs": TEXTS, "prompt_name": "query", "normalize": True}
    same(post(server, path, **body, truncation_direction="Right").json(), vectors["query"])
    inner = post(server, path, inputs=TEXTS, parameters={"prompt_name": "query"})
    same(inner.json(), vectors["query"])


def test_tei_cuts_when_told(server: AppInProcess) -> None:
    for fields in ({}, {"truncate": False}):
        refused = server.client.post("/embed", json={"inputs": LONG, **fields})
        assert refused.status_code == 400
        error = refused.json()
        assert error.keys() == {"error", "error_type"}
        assert error["error_type"] == "Validation"
        assert "maximum context length" in error["error"]
    right = post(server, "/embed", inputs=LONG, truncate=True)
    left = post(server, "/embed", inputs=LONG, truncate=True, truncation_direction="Left")
    assert right.headers["x-nv-embed-truncated"] == left.headers["x-nv-embed-truncated"] == "0"


@pytest.mark.parametrize("path", ["/similarity", "/"])
def test_similarities(server: AppInProcess, vectors: dict[str, np.ndarray], path: str) -> None:
    body = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    found = post(server, path, inputs=body, parameters={}).json()
    same(found, vectors["none"][1:] @ vectors["none"][0])


def test_tei_reads_its_own_errors(server: AppInProcess) -> None:
    for body in ({"inputs": [""]}, {}, {"inputs": "x", "normalize": False}, {"inputs": {"a": "b"}}):
        answer = server.client.post("/embed", json=body)
        assert answer.status_code == 400
        assert isinstance(answer.json()["error"], str)
    assert "inputs" in server.client.post("/embed", json={"inputs": [""]}).json()["error"]
    info = server.client.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["max_input_length"] == info["limits"]["max_input_tokens"]


def test_a_browser_at_the_base_is_told_where_to_go(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, playground=False) as server:
        answer = server.client.get("/")
    assert answer.status_code == 404
    assert "POST /v1/embeddings" in str(answer.json()["error"])


# Ollama


def test_ollama(server: AppInProcess, vectors: dict[str, np.ndarray]) -> None:
    found = post(server, "/api/embed", model="golden-embed:latest", input=TEXTS).json()
    same(found["embeddings"], vectors["none"])
    assert found["model"] == "golden-embed:latest"
    assert found["total_duration"] > 0
    assert found["prompt_eval_count"] > 3
    query = post(server, "/api/embed", model="golden-embed-query:latest", input=TEXTS[0])
    same(query.json()["embeddings"], vectors["query"][:1])
    old = post(server, "/api/embeddings", model="golden-embed", prompt=TEXTS[0]).json()
    same(old["embedding"], vectors["none"][0])


def test_ollama_cuts_unless_told_otherwise(server: AppInProcess) -> None:
    answer = post(server, "/api/embed", model="golden-embed", input=LONG)
    assert answer.headers["x-nv-embed-truncated"] == "0"
    refused = server.client.post(
        "/api/embed", json={"model": "golden-embed", "input": LONG, "truncate": False}
    )
    assert (refused.status_code, list(refused.json())) == (400, ["error"])


def test_ollamas_models(server: AppInProcess) -> None:
    tags = server.client.get("/api/tags").json()["models"]
    assert [tag["name"] for tag in tags][:2] == [
        "golden-embed:latest", "golden-embed-query:latest",
    ]  # fmt: skip
    shown = server.client.post("/api/show", json={"model": tags[0]["name"]}).json()
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["nv-embed.embedding_length"] == 64
    assert server.client.get("/api/version").json()["version"]
    for path in ("/api/show", "/api/embed"):
        unknown = server.client.post(path, json={"model": "llama3", "input": "x"})
        assert unknown.status_code == 404
        assert "llama3" in unknown.json()["error"]


# Azure, and keys


def test_azure(server: AppInProcess, vectors: dict[str, np.ndarray]) -> None:
    for name, side in (("golden-embed", "none"), ("golden-embed-query", "query")):
        path = f"/openai/deployments/{name}/embeddings?api-version=2024-10-21"
        found = post(server, path, input=TEXTS).json()
        same([row["embedding"] for row in found["data"]], vectors[side])
        assert found["model"] == name
    v1 = post(server, "/openai/v1/embeddings", model="golden-embed", input=TEXTS).json()
    same([row["embedding"] for row in v1["data"]], vectors["none"])
    unknown = server.client.post("/openai/deployments/gpt-4/embeddings", json={"input": "x"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"


def test_keys_come_in_three_headers(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, api_key=["secret"]) as server:
        good = [{"authorization": "Bearer secret"}, {"api-key": "secret"}, {"x-api-key": "secret"}]
        bad = [{}, {"api-key": "other"}, {"authorization": "Bearer other"}]
        paths = {
            "/v1/embeddings": {"input": "x"},
            "/v2/embed": {"texts": ["x"]},
            "/embed": {"inputs": "x"},
            "/api/embed": {"input": "x"},
            "/rerank": {"query": "x", "documents": ["y"]},
        }
        for path, body in paths.items():
            for headers in good:
                answer = server.client.post(path, json=body, headers=headers)
                assert answer.status_code == 200, answer.text
            for headers in bad:
                answer = server.client.post(path, json=body, headers=headers)
                assert answer.status_code == 401
                assert "secret" not in answer.text
        refused = {path: server.client.post(path, json=body).json() for path, body in paths.items()}
        assert isinstance(refused["/v2/embed"]["message"], str)
        assert isinstance(refused["/api/embed"]["error"], str)
        assert refused["/embed"]["error_type"] == "Unauthorized"
        assert refused["/rerank"]["error"]["code"] == "invalid_api_key"


# Rerank and score


@pytest.fixture(scope="module")
def cosines(vectors: dict[str, np.ndarray]) -> np.ndarray:
    """Of the first text as a query and each as a passage."""
    return np.asarray(vectors["passage"] @ vectors["query"][0])


def test_rerank(server: AppInProcess, cosines: np.ndarray) -> None:
    order = np.argsort(-cosines)
    body = {"model": "golden-embed", "query": TEXTS[0], "documents": TEXTS}
    for path, shows in (("/rerank", True), ("/v1/rerank", True), ("/v2/rerank", False)):
        answer = post(server, path, **body)
        assert answer.headers["x-nv-embed-score"] == "cosine"
        results = answer.json()["results"]
        assert [row["index"] for row in results] == order.tolist()
        same([row["relevance_score"] for row in results], cosines[order])
        assert all((row.get("document") is not None) is shows for row in results)
    few = post(server, "/v2/rerank", **body, top_n=2, return_documents=True).json()["results"]
    assert [row["document"]["text"] for row in few] == [TEXTS[i] for i in order[:2]]
    objects = {**body, "documents": [{"text": text} for text in TEXTS]}
    assert post(server, "/v1/rerank", **objects).json()["results"][0]["index"] == order[0]


def test_rerank_of_tei_and_nim(server: AppInProcess, cosines: np.ndarray) -> None:
    order = np.argsort(-cosines).tolist()
    tei = post(server, "/rerank", query=TEXTS[0], texts=TEXTS, return_text=True).json()
    assert [row["index"] for row in tei] == order
    same([row["score"] for row in tei], cosines[order])
    assert tei[0]["text"] == TEXTS[order[0]]
    nim = post(
        server,
        "/v1/ranking",
        model="golden-embed",
        query={"text": TEXTS[0]},
        passages=[{"text": text} for text in TEXTS],
        truncate="END",
    ).json()
    assert [row["index"] for row in nim["rankings"]] == order
    same([row["logit"] for row in nim["rankings"]], cosines[order])


def test_score(server: AppInProcess, vectors: dict[str, np.ndarray], cosines: np.ndarray) -> None:
    for path in ("/score", "/v1/score"):
        one = post(server, path, model="golden-embed", text_1=TEXTS[0], text_2=TEXTS).json()
        same([row["score"] for row in one["data"]], cosines)
        each = post(server, path, queries=TEXTS, documents=TEXTS).json()
        pairs = (vectors["query"] * vectors["passage"]).sum(axis=1)
        same([row["score"] for row in each["data"]], pairs)
        assert each["usage"]["total_tokens"] > 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", {"query": "x"}, "documents"),
        ("/rerank", {"documents": ["x"]}, "query"),
        ("/rerank", {"query": ["x", "y"], "documents": ["x"]}, "query"),
        ("/rerank", {"query": "x", "documents": ["x", ""]}, "documents[1]"),
        ("/rerank", {"query": "x", "documents": [[1, 2]]}, "documents"),
        ("/rerank", {"query": "x", "documents": ["y"], "top_n": 0}, "top_n"),
        ("/rerank", {"query": "x", "documents": ["y", LONG], "truncate": "NONE"}, "documents[1]"),
        ("/rerank", {"query": LONG, "documents": ["y"], "truncate": "NONE"}, "query"),
        ("/score", {"text_1": ["x", "y"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/ranking", {"query": {"text": "x"}, "passages": []}, "passages"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_ranked(
    server: AppInProcess, path: str, body: dict[str, Any], param: str
) -> None:
    answer = server.client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


# All of them


@pytest.mark.parametrize(
    ("path", "name", "rest"),
    [
        ("/v2/embed", "texts", {"truncate": "END"}),
        ("/embed", "inputs", {"truncate": True}),
        ("/api/embed", "input", {}),
        ("/rerank", "documents", {"query": "x"}),
        ("/score", "text_2", {"text_1": "x"}),
    ],
)
def test_many_texts_in_each(
    server: AppInProcess, path: str, name: str, rest: dict[str, Any]
) -> None:
    """More than is read at once."""
    texts = [f"text {number} " + "x" * 60 for number in range(1500)]
    started = time.monotonic()
    answer = post(server, path, **{name: texts}, **rest)
    assert len(answer.content) > 1500 * 20
    assert time.monotonic() - started < 60
    many = server.client.post(path, json={name: texts * 2, **rest})
    assert many.status_code == 400
    assert name in many.text


def test_unknown_fields_are_named_and_those_that_matter_refused(server: AppInProcess) -> None:
    answer = post(server, "/v2/embed", texts=["x"], embeding_types=["float"])
    assert answer.headers["x-ignored-fields"].startswith("embeding_types")
