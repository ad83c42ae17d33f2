"""What vLLM's own tests of its embedding, Cohere and scoring routes assert, written anew, where
this server has the route: the contract that its users rely on.

Left out: `messages`, `/pooling`, `/invocations`, `bytes` formats and chunking, which are not here;
`use_activation: false` and its like, which are refused (`test_garbage.py`).
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.fakes import AppInProcess, in_process

MODEL = "golden-embed"
TEXT = "a server that supports many different models"
QUESTIONS = ["What is the capital of France?", "What is the capital of Germany?"]
ANSWERS = ["The capital of France is Paris.", "The capital of Germany is Berlin."]
LONG = " ".join(f"alpha{number}" for number in range(200))


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False, max_input_tokens=300) as server:
        yield server


def post(server: AppInProcess, path: str, **body: object) -> httpx.Response:
    return server.client.post(path, json={"model": MODEL, **body})


def answer(server: AppInProcess, path: str, **body: object) -> dict[str, Any]:
    found = post(server, path, **body)
    assert found.status_code == 200, found.text
    return dict(found.json())


def embeddings(server: AppInProcess, **body: object) -> np.ndarray:
    found = answer(server, "/v1/embeddings", encoding_format="float", **body)
    return np.array([row["embedding"] for row in found["data"]])


def cohere(server: AppInProcess, texts: list[str], *types: str, **body: object) -> Any:
    types = types or ("float",)
    return answer(server, "/v2/embed", texts=texts, embedding_types=types, **body)


# Embeddings


def test_texts_and_their_ids_are_the_same(server: AppInProcess) -> None:
    ids = answer(server, "/tokenize", input=TEXT)["data"][0]["ids"]
    for inputs in (TEXT, ids, [TEXT] * 10, [ids] * 10):
        found = answer(server, "/v1/embeddings", input=inputs, encoding_format="float")
        count = 10 if inputs in ([TEXT] * 10, [ids] * 10) else 1
        assert [row["index"] for row in found["data"]] == list(range(count))
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == count * len(ids)
        rows = np.array([row["embedding"] for row in found["data"]])
        np.testing.assert_allclose(rows, embeddings(server, input=[TEXT] * count), atol=1e-5)


def test_truncation_counts_what_was_kept(server: AppInProcess) -> None:
    ids = answer(server, "/tokenize", input=LONG[:200])["data"][0]["ids"]
    for inputs in ([LONG[:200]], ids):
        found = answer(server, "/v1/embeddings", input=inputs, truncate_prompt_tokens=10)
        assert found["usage"]["prompt_tokens"] == 10


def test_base64_in_every_type_and_order(server: AppInProcess) -> None:
    exact = embeddings(server, input=[TEXT] * 3)
    types = {"float32": "f4", "float16": "f2"}
    for (name, dtype), (order, sign) in product(
        types.items(), {"native": "<", "little": "<", "big": ">"}.items()
    ):
        found = answer(
            server,
            "/v1/embeddings",
            input=[TEXT] * 3,
            encoding_format="base64",
            embed_dtype=name,
            endianness=order,
        )
        rows = [
            np.frombuffer(base64.b64decode(row["embedding"]), sign + dtype) for row in found["data"]
        ]
        np.testing.assert_allclose(np.array(rows, dtype=np.float64), exact, atol=1e-2)


@pytest.mark.parametrize("name", ["encoding_format", "embed_dtype", "endianness"])
def test_a_bad_word_is_named(server: AppInProcess, name: str) -> None:
    body = {"encoding_format": "base64", name: f"bad_{name}"}
    found = post(server, "/v1/embeddings", input=TEXT, **body)
    assert found.status_code == 400
    assert name in found.json()["error"]["message"]


def test_dimensions_of_a_model_that_was_not_trained_for_fewer(server: AppInProcess) -> None:
    assert len(embeddings(server, input=[TEXT] * 3, dimensions=None)) == 3
    for dimensions in (-1, 16):
        found = post(server, "/v1/embeddings", input=[TEXT], dimensions=dimensions)
        assert found.status_code == 400


# Cohere's


def test_cohere_has_the_vectors_and_the_tokens_of_openai(server: AppInProcess) -> None:
    texts = ["machine learning", "deep learning", "a chocolate cake"]
    found = cohere(server, texts)
    rows = np.array(found["embeddings"]["float"])
    np.testing.assert_allclose(rows, embeddings(server, input=texts), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-2)
    usage = answer(server, "/v1/embeddings", input=texts)["usage"]
    assert found["meta"]["billed_units"]["input_tokens"] == usage["prompt_tokens"]


def test_coheres_answer_has_its_parts(server: AppInProcess) -> None:
    found = cohere(server, ["test"])
    assert found["id"]
    assert found["texts"] == ["test"]
    assert found["meta"]["api_version"]["version"] == "2"


def test_coheres_types(server: AppInProcess) -> None:
    found = cohere(server, ["test"], "float", "binary", "ubinary", "base64")["embeddings"]
    width = len(found["float"][0])
    assert len(found["binary"][0]) == len(found["ubinary"][0]) == width // 8
    decoded = np.frombuffer(base64.b64decode(found["base64"][0]), "<f4")
    np.testing.assert_allclose(found["float"][0], decoded, rtol=1e-5)


def test_what_cohere_refuses(server: AppInProcess) -> None:
    assert post(server, "/v2/embed").status_code == 400
    found = post(
        server, "/v2/embed", texts=["a"], input_type="nonexistent", embedding_types=["float"]
    )
    assert found.status_code == 400
    assert "input_type" in found.text


def test_how_cohere_cuts(server: AppInProcess) -> None:
    rows = {
        side: np.array(cohere(server, [LONG], truncate=side)["embeddings"]["float"][0])
        for side in ("END", "START")
    }
    assert rows["END"] @ rows["START"] < 0.99
    refused = post(server, "/v2/embed", texts=[LONG], embedding_types=["float"], truncate="NONE")
    assert refused.status_code == 400


# Scores, by two vectors


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        (QUESTIONS[0], ANSWERS[0], [(0, 0)]),
        (QUESTIONS[0], ANSWERS, [(0, 0), (0, 1)]),
        (QUESTIONS, ANSWERS, [(0, 0), (1, 1)]),
    ],
    ids=["one and one", "one and many", "pairs"],
)
def test_scores_are_of_query_and_passage(
    server: AppInProcess, first: Any, second: Any, pairs: list[tuple[int, int]]
) -> None:
    queries = embeddings(server, input=QUESTIONS, input_type="query")
    passages = embeddings(server, input=ANSWERS, input_type="passage")
    found = answer(server, "/score", text_1=first, text_2=second)
    scores = [row["score"] for row in found["data"]]
    assert [row["index"] for row in found["data"]] == list(range(len(pairs)))
    np.testing.assert_allclose(scores, [queries[i] @ passages[j] for i, j in pairs], rtol=1e-2)


def test_rerank_orders_and_keeps_the_best(server: AppInProcess) -> None:
    documents = ["The capital of Brazil is Brasilia.", ANSWERS[0], "Encoders are neat"]
    passages = embeddings(server, input=documents, input_type="passage")
    scores = passages @ embeddings(server, input=QUESTIONS[0], input_type="query")[0]
    body = {"query": QUESTIONS[0], "documents": documents}
    found = answer(server, "/rerank", **body)["results"]
    assert [row["index"] for row in found] == np.argsort(-scores).tolist()
    given = [row["relevance_score"] for row in found]
    np.testing.assert_allclose(given, np.sort(scores)[::-1], rtol=1e-2)
    best = answer(server, "/rerank", **body, top_n=2)["results"]
    assert [row["index"] for row in best] == [row["index"] for row in found[:2]]


@pytest.mark.parametrize("path", ["/rerank", "/score"])
def test_a_question_that_is_too_long_is_refused(server: AppInProcess, path: str) -> None:
    names = ("query", "documents") if path == "/rerank" else ("text_1", "text_2")
    body = dict(zip(names, (LONG, ANSWERS), strict=True))
    found = post(server, path, **body, truncate="NONE")
    assert found.status_code == 400
    assert "maximum context length" in found.text
    assert (
        post(server, path, **body).status_code == 200
    )  # cut, as Cohere's and Jina's are by default


@pytest.mark.parametrize(
    ("first", "second"), [("queries", "documents"), ("queries", "items"), ("data_1", "data_2")]
)
def test_other_names_of_what_is_scored(server: AppInProcess, first: str, second: str) -> None:
    plain = answer(server, "/score", text_1=QUESTIONS, text_2=ANSWERS)["data"]
    assert answer(server, "/score", **{first: QUESTIONS, second: ANSWERS})["data"] == plain
