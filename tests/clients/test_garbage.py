"""Fields of other dialects that change what the numbers are: honoured, or refused by name.

Never a 200 whose numbers are not what was asked for. Each body is one that a client sends.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.api.vector_format import int8_scale
from tests.server.fakes import AppInProcess, in_process

TEXTS = ["when is lunch served?", "wizards vex", "a"]
DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "int8": "i1",
    "uint8": "u1",
    "binary": "i1",
    "ubinary": "u1",
}


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


@pytest.fixture(scope="module")
def exact(server: AppInProcess) -> np.ndarray:
    return numbers(ask(server))


def ask(server: AppInProcess, **fields: object) -> list[Any]:
    body = {"model": "golden-embed", "input": TEXTS, **fields}
    answer = server.client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    return [row["embedding"] for row in answer.json()["data"]]


def numbers(rows: list[Any], dtype: str = "<f4") -> np.ndarray:
    """As a client reads them: base64 as the bytes of the type that it asked for."""
    if isinstance(rows[0], str):
        rows = [np.frombuffer(base64.b64decode(row, validate=True), dtype) for row in rows]
    return np.array(rows, dtype=np.float64)


def expected(exact: np.ndarray, dtype: str) -> np.ndarray:
    """By numpy, as the documentation says it."""
    bits = np.array([[row[i : i + 8] for i in range(0, len(row), 8)] for row in exact > 0])
    bytes_ = (bits * 2 ** np.arange(7, -1, -1)).sum(axis=2)
    return {
        "float32": exact,
        "float16": exact.astype(np.float16).astype(np.float64),
        "int8": np.rint(exact * 127),
        "uint8": np.rint(exact * 127) + 128,
        "binary": bytes_ - 128,
        "ubinary": bytes_,
    }[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["output_dtype", "embed_dtype", "embedding_type"])
def test_each_type_of_number(
    server: AppInProcess, exact: np.ndarray, name: str, dtype: str
) -> None:
    wanted = expected(exact, dtype)
    for form in ("float", "base64"):
        got = numbers(ask(server, encoding_format=form, **{name: dtype}), DTYPES[dtype])
        assert got.shape == (len(TEXTS), 8 if "binary" in dtype else exact.shape[1])
        np.testing.assert_allclose(got, wanted, atol=0 if "binary" in dtype else 1.01)
        if dtype.startswith("float"):
            np.testing.assert_allclose(got, wanted, atol=1e-3 if dtype == "float16" else 1e-6)
        elif dtype == "int8":
            unit = got / np.linalg.norm(got, axis=1, keepdims=True)
            assert (unit * exact).sum(axis=1).min() > 0.99


def test_voyageais_int8(server: AppInProcess, exact: np.ndarray) -> None:
    """The body that its SDK sends, and how it reads the answer."""
    rows = ask(
        server,
        input_type="document",
        truncation=True,
        output_dtype="int8",
        output_dimension=None,
        encoding_format="base64",
    )
    got = numbers(rows, "i1")
    assert got.shape == exact.shape
    cosines = (got * exact).sum(axis=1) / np.linalg.norm(got, axis=1)
    assert cosines.min() >= 0.99


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_order_of_bytes(server: AppInProcess, exact: np.ndarray, dtype: str) -> None:
    for endianness, order in (("native", "<"), ("little", "<"), ("big", ">")):
        rows = ask(server, encoding_format="base64", embed_dtype=dtype, endianness=endianness)
        got = numbers(rows, order + DTYPES[dtype][1:])
        np.testing.assert_allclose(got, exact, atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"output_dtype": "int4"}, "output_dtype"),
        ({"embed_dtype": "fp8_e4m3"}, "embed_dtype"),
        ({"embedding_type": ["int8"]}, "embedding_type"),
        ({"embedding_types": ["float", "int8"]}, "embedding_types"),
        ({"embedding_types": []}, "embedding_types"),
        ({"endianness": "middle"}, "endianness"),
        ({"normalize": False}, "normalize"),
        ({"normalized": False}, "normalized"),
        ({"use_activation": False}, "use_activation"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "messages"),
        ({"images": ["https://example.org/a.png"]}, "images"),
        ({"late_chunking": True}, "late_chunking"),
        ({"return_multivector": True}, "return_multivector"),
        ({"add_special_tokens": False}, "add_special_tokens"),
        ({"truncation_side": "left"}, "truncation_side"),
        ({"truncation_side": "up", "truncate": True}, "truncation_side"),
        ({"output_dtype": "int8", "embed_dtype": "float16"}, "embed_dtype"),
        ({"dimensions": 64, "output_dimension": 32}, "output_dimension"),
        ({"extra_body": {"input_type": "question"}}, "input_type"),
        ({"extra_body": {"input_type": "query"}, "input_type": "passage"}, "input_type"),
        ({"extra_body": {"output_dtype": "int4"}}, "output_dtype"),
        ({"extra_body": ["input_type"]}, "extra_body"),
        ({"input": [{"text": "a", "image": "b"}]}, "input"),
        ({"input": [{"image": "https://example.org/a.png"}]}, "input"),
    ],
    ids=str,
)
def test_what_is_not_done_is_refused_by_name(
    server: AppInProcess, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "golden-embed", "input": TEXTS, **fields}
    padding = {"surprise": "x" * 70_000}  # such bodies are read in pieces
    for sent in (body, {**body, **padding}):
        answer = server.client.post("/v1/embeddings", json=sent)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"].partition("[")[0] == param
        assert param in error["message"]


@pytest.mark.parametrize(
    ("fields", "same_as"),
    [
        ({"normalize": True, "use_activation": True, "late_chunking": False}, {}),
        ({"messages": None, "embedding_types": None, "extra_body": None}, {}),
        ({"dimensions": 0}, {}),
        ({"model": None}, {}),
        ({"embedding_types": ["float"]}, {}),
        ({"input": [{"text": text} for text in TEXTS]}, {}),
        ({"extra_body": {"input_type": "query"}}, {"input_type": "query"}),
        ({"input_type": "QUERY"}, {"input_type": "query"}),
        ({"input_type": "SEARCH_DOCUMENT"}, {"input_type": "passage"}),
        ({"task": "retrieval.query"}, {"input_type": "query"}),
        ({"task": "retrieval.passage"}, {"input_type": "passage"}),
        ({"task": "text-matching"}, {"task": "STS"}),
        ({"input_type": "classification"}, {}),
        ({"truncate": "RIGHT"}, {"truncate": "END"}),
    ],
    ids=str,
)
def test_other_words_for_the_same(
    server: AppInProcess, fields: dict[str, Any], same_as: dict[str, Any]
) -> None:
    np.testing.assert_allclose(
        numbers(ask(server, **fields)), numbers(ask(server, **same_as)), atol=1e-6
    )


def test_the_side_where_a_text_is_cut(server: AppInProcess) -> None:
    text = " ".join(f"word{number}" for number in range(200))

    def vectors(**fields: object) -> np.ndarray:
        return numbers(ask(server, input=text, truncate_prompt_tokens=12, **fields))

    last, first = vectors(), vectors(truncation_side="right")
    assert np.abs(last - first).max() > 0.01
    np.testing.assert_allclose(vectors(truncation_direction="Left"), last, atol=1e-6)
    ids = {
        side: server.client.post(
            "/tokenize",
            json={"input": text, "truncate_prompt_tokens": 12, "truncation_side": side},
        ).json()["data"][0]["ids"]
        for side in ("left", "right")
    }
    whole = server.client.post("/tokenize", json={"input": text}).json()["data"][0]["ids"]
    assert ids["right"][:11] == whole[:11]
    assert ids["left"][1:] == whole[-11:]


def test_base64_of_jina(server: AppInProcess, exact: np.ndarray) -> None:
    rows = ask(server, embedding_type="base64")
    assert isinstance(rows[0], str)
    np.testing.assert_allclose(numbers(rows), exact, atol=1e-6)


def test_the_scale_of_int8() -> None:
    assert (int8_scale(64), int8_scale(256), int8_scale(4096)) == (127, 127, 508)
