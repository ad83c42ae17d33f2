"""Which side a text is on: by the path, which every client lets its user set, by a text that brings
its instruction along, and as every answer says it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.fakes import AppInProcess, in_process

TEXTS = ["when is lunch served?", "wizards vex"]
TASK = "Given a question, retrieve passages that answer the question"


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


def ask(
    server: AppInProcess, path: str = "/v1/embeddings", **fields: object
) -> tuple[np.ndarray, httpx.Headers]:
    body = {"model": "golden-embed", "input": TEXTS, **fields}
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    rows = [row["embedding"] for row in answer.json()["data"]]
    return np.array(rows), answer.headers


@pytest.mark.parametrize("side", ["query", "passage"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input_type": "passage"},
        {"input_type": "query"},
        {"input_type": ""},
        {"model": "golden-embed-passage"},
        {"model": "golden-embed-query"},
    ],
    ids=str,
)
def test_the_path_is_stronger_than_any_field(
    server: AppInProcess, side: str, fields: dict[str, str]
) -> None:
    expected, _ = ask(server, input_type=side)
    for path in (f"/{side}/v1/embeddings", f"/{side}/embeddings"):
        found, headers = ask(server, path, **fields)
        np.testing.assert_array_equal(found, expected)
        assert headers["x-nv-embed-input-type"] == side


def test_the_path_alone_is_the_route_that_hugging_face_posts_to(server: AppInProcess) -> None:
    for path in ("/query", "/query/"):
        found = server.client.post(path, json={"inputs": TEXTS})
        assert found.status_code == 200, found.text
        np.testing.assert_allclose(found.json(), ask(server, input_type="query")[0], atol=1e-6)


def test_the_path_is_before_every_route(server: AppInProcess) -> None:
    for path in ("/v1/models", "/models/golden-embed", "/info", "/livez", "/v1/instructions"):
        assert server.client.get(f"/query{path}").status_code == 200
    tokens = server.client.post("/query/tokenize", json={"input": "a"}).json()
    assert tokens["prefix"].startswith("Instruct: ")
    described, _ = ask(server, "/query/v1/embeddings", instruction="Find it")
    np.testing.assert_array_equal(described, ask(server, instruction="Find it")[0])
    assert server.client.get("/query/nope").status_code == 404
    assert server.client.get("/question/v1/models").status_code == 404


@pytest.mark.parametrize(
    ("fields", "side"),
    [
        ({}, "none"),
        ({"input_type": "passage"}, "passage"),
        ({"input_type": "query"}, "query"),
        ({"instruction": "Find it"}, "query"),
        ({"task": "NQ"}, "query"),
        ({"task": "NQ", "input_type": "passage"}, "passage"),
        ({"model": "golden-embed-query"}, "query"),
        ({"prompt": "Instruct: x\nQuery: "}, "none"),
        ({"input_type": "clustering"}, "query"),
    ],
    ids=str,
)
def test_each_answer_says_its_side(server: AppInProcess, fields: dict[str, str], side: str) -> None:
    assert ask(server, **fields)[1]["x-nv-embed-input-type"] == side


@pytest.mark.parametrize("end", ["\n", " "])
def test_a_text_that_brings_its_instruction(server: AppInProcess, end: str) -> None:
    """As Haystack's prefix does; LangChainJS and others turn the newline into a space."""
    written = [f"Instruct: {TASK}{end}Query: {text}" for text in TEXTS]
    expected, _ = ask(server, prompt=f"Instruct: {TASK}\nQuery: ")
    for fields in ({}, {"input_type": "query"}, {"model": "golden-embed-query"}):
        found, headers = ask(server, input=written, **fields)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert headers["x-nv-embed-input-type"] == "query"
    (first,), headers = ask(server, input=written[0])
    np.testing.assert_allclose(first, expected[0], atol=1e-6)
    mixed, headers = ask(server, input=[written[0], TEXTS[1]])
    np.testing.assert_allclose(mixed, [expected[0], ask(server)[0][1]], atol=1e-6)
    assert headers["x-nv-embed-input-type"] == "mixed"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("Instruct: x\nQuery: y", {"input_type": "passage"}),
        ("Instruct: x\nQuery: y", {"prompt": ""}),
        ("Instruct: x\nQuery: y", {"task": ""}),
        ("Instruct: x\nQuery: ", {}),
        ("Instruct: \nQuery: y", {}),
        ("Instruct: x Question: y", {}),
        ("instruct: x\nQuery: y", {}),
        (" Instruct: x\nQuery: y", {}),
        ("Instruct: " + "x" * 3000 + "\nQuery: y", {}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_stays_a_text(server: AppInProcess, text: str, fields: dict[str, Any]) -> None:
    found, _ = ask(server, input=text, **fields)
    expected, _ = ask(server, input=text, prompt="")
    np.testing.assert_array_equal(found, expected)


def test_it_can_be_turned_off(golden_checkpoint: Path) -> None:
    text = f"Instruct: {TASK}\nQuery: {TEXTS[0]}"
    with in_process(golden_checkpoint, detect_instructions=False) as server:
        np.testing.assert_array_equal(
            ask(server, input=text)[0], ask(server, input=text, prompt="")[0]
        )


def test_a_written_instruction_is_cut_and_refused_as_a_prompt_is(server: AppInProcess) -> None:
    text = "word " * 40_000
    for limit in ({}, {"truncate": True}):
        written, prompted = (
            server.client.post("/v1/embeddings", json={"input": text_of, **fields, **limit})
            for text_of, fields in (
                (f"Instruct: x\nQuery: {text}", {}),
                (text, {"prompt": "Instruct: x\nQuery: "}),
            )
        )
        assert written.status_code == prompted.status_code == (200 if limit else 400)
        assert written.json() == prompted.json()


def test_which_inputs_were_cut(server: AppInProcess) -> None:
    long, short = "a lot of words " * 20, "x"
    inputs = [long, long, short, long, "Instruct: x\nQuery: " + long, short]
    _, headers = ask(server, input=inputs, truncate_prompt_tokens=20)
    assert headers["x-nv-embed-truncated"] == "0-1,3-4"
    assert "x-nv-embed-truncated" not in ask(server, input=inputs)[1]
    huge = "word " * 40_000  # of which only a part is tokenized
    for truncate in ("END", "START"):
        assert ask(server, input=[huge], truncate=truncate)[1]["x-nv-embed-truncated"] == "0"


def test_the_fingerprint_is_of_the_vectors(
    server: AppInProcess, golden_checkpoint: Path, tmp_path: Path
) -> None:
    name = "x-nv-embed-fingerprint"
    first = ask(server)[1][name]
    assert len(first) == 16
    for fields in ({"input_type": "query"}, {"encoding_format": "float"}, {"output_dtype": "int8"}):
        assert ask(server, **fields)[1][name] == first
    with in_process(golden_checkpoint, allow_truncated_dimensions=True) as other:
        assert ask(other)[1][name] == first
        assert ask(other, dimensions=32)[1][name] != first
    body = {"model": "golden-embed", "input": TEXTS}
    same = server.client.post("/v1/embeddings", json=body, headers={name: first})
    assert same.status_code == 200
    another = server.client.post("/v1/embeddings", json=body, headers={name: "0" * 16})
    assert another.status_code == 409
    assert another.json()["error"]["code"] == "not_these_vectors"
    assert first in another.json()["error"]["message"]
    assert another.headers["x-should-retry"] == "false"
