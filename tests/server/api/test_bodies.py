"""How a body may come, and what is said of odd ones: the app in this process."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.tokenizer import NVEmbedTokenizer
from server.api.hints import ignored_names, nearest
from tests.server.fakes import AppInProcess, in_process
from tests.server.runners import vector_of

MODEL = "golden-embed"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, log_format="json") as server:
        yield server


def post(server: AppInProcess, body: bytes, path: str = "/v1/embeddings", **headers: str) -> Any:
    return server.client.post(path, content=body, headers=JSON | headers)


def vectors_of(answer: httpx.Response) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


# How JSON comes


@pytest.mark.parametrize("padding", [0, 100_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        (rb'"input": ["a", "b \ud83d", "c"]', {"input": ["a", "b \ufffd", "c"]}),
        (rb'"input": "\ude00x"', {"input": "\ufffdx"}),
        (rb'"input": "x", "user": "\ud83d"', {"input": "x"}),
        (rb'"input": "x", "metadata": {"\ud83d": ["\ud83d"]}', {"input": "x"}),
        (rb'"input": "x", "prompt": "p \ud83d: "', {"input": "x", "prompt": "p \ufffd: "}),
        (b'"input": "x", "score": NaN, "other": [-Infinity]', {"input": "x"}),
    ],
)
def test_half_pairs_and_nan_harm_nothing_else(
    server: AppInProcess, fields: bytes, meant: dict[str, Any], padding: int
) -> None:
    body = b'{"model": "%b", %b, "user": "%b"}' % (MODEL.encode(), fields, b"u" * padding)
    assert vectors_of(post(server, body)) == server.vectors(**meant)


@pytest.mark.parametrize("padding", [0, 100_000], ids=["small", "large"])
def test_a_byte_order_mark_is_skipped(server: AppInProcess, padding: int) -> None:
    body = json.dumps({"model": MODEL, "input": "x", "user": "u" * padding}).encode()
    assert vectors_of(post(server, b"\xef\xbb\xbf" + body)) == server.vectors(input="x")


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b'{"model": "golden-embed", "input": NaN}', "input", "must be a string"),
        (b'{"model": "golden-embed", "input": [1, NaN]}', "input", "must not mix"),
        (b'{"model": "golden-embed", "input": "x", "dimensions": NaN}', "dimensions", "integer"),
        ('{"model": "golden-embed", "input": "x"}'.encode("utf-16"), None, "not UTF-8"),
        (b'{"model": "golden-embed", "input": "\xe9"}', None, "not UTF-8"),
        (b'{"model": "golden-embed", "input": "x"}{}', None, "not valid JSON"),
    ],
)
def test_what_is_no_json_or_no_value_is_refused(
    server: AppInProcess, body: bytes, param: str | None, words: str
) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert words in error_of(answer)["message"]


def test_large_bodies_mean_what_small_ones_mean(
    server: AppInProcess, tokenizer: NVEmbedTokenizer
) -> None:
    texts = [f'text {n}: "quoted" \\ 🙂 é\n' + "word " * (n % 40) for n in range(2048)]
    ids = [tokenizer.encode(text, max_tokens=10_000).ids for text in texts]
    expected = np.array([vector_of(each) for each in ids])
    for inputs in (texts, [each.tolist() for each in ids]):
        for ensure_ascii in (True, False):
            body = {"x": [[1, {"a": "]"}]], "input": inputs, "model": MODEL}
            raw = json.dumps(body, ensure_ascii=ensure_ascii).encode()
            assert len(raw) > 100_000
            np.testing.assert_allclose(vectors_of(post(server, raw)), expected, atol=1e-7)


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "deflate", "gzip, identity", "zstd"])
def test_an_encoded_body_is_a_415_that_names_the_header(server: AppInProcess, coding: str) -> None:
    body = gzip.compress(json.dumps({"model": MODEL, "input": "x"}).encode())
    for path in ("/v1/embeddings", "/tokenize"):
        answer = post(server, body, path, **{"content-encoding": coding})
        assert answer.status_code == 415
        assert f"Content-Encoding: '{coding.lower()}'" in error_of(answer)["message"]


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_an_encoding_that_is_none_is_fine(server: AppInProcess, coding: str) -> None:
    body = json.dumps({"model": MODEL, "input": "x"}).encode()
    assert post(server, body, **{"content-encoding": coding}).status_code == 200


@pytest.mark.parametrize(
    "given", ["application/json, application/json", "text/plain", "multipart/form-data; boundary=x"]
)
def test_a_wrong_content_type_is_named(server: AppInProcess, given: str) -> None:
    body = json.dumps({"model": MODEL, "input": "x"}).encode()
    answer = post(server, body, **{"content-type": given})
    assert answer.status_code == 415
    assert f"came as '{given}'" in error_of(answer)["message"]
    parameters = "application/json; charset=utf-8; charset=utf-8"
    assert post(server, body, **{"content-type": parameters}).status_code == 200


@pytest.mark.parametrize(
    "charset", ["utf-16", "ISO-8859-1", '"utf-7"', "utf-8; charset=utf-16", ""]
)
def test_another_charset_is_refused_and_not_guessed(server: AppInProcess, charset: str) -> None:
    """UTF-7's bytes are ASCII: taken for UTF-8 they are another text."""
    given = f"application/json; charset={charset}"
    body = b'{"model": "golden-embed", "input": "Hi Mom +Jjo-!"}'
    answer = post(server, body, **{"content-type": given})
    assert answer.status_code == 415
    assert "must be UTF-8" in error_of(answer)["message"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf-8"', " utf8 ", "us-ascii"])
@pytest.mark.parametrize("media_type", ["application/json", "application/vnd.api+json; x=y"])
def test_utf8_by_any_of_its_names(server: AppInProcess, charset: str, media_type: str) -> None:
    given = f"{media_type};charset={charset}; version=1"
    body = b'{"model": "golden-embed", "input": "x"}'
    assert post(server, body, **{"content-type": given}).status_code == 200


def test_checksum_of_a_gzip_body_is_not_looked_at(server: AppInProcess) -> None:
    """A header that lies is refused by its name, too, and costs no decoding."""
    body = zlib.compress(b"0" * 10_000_000)
    answer = post(server, body, **{"content-encoding": "deflate"})
    assert answer.status_code == 415


# What was meant


def test_ignored_fields_are_named_in_a_header(server: AppInProcess) -> None:
    answer = server.embed(input="x", inputtype="query", stream=False, **{"no name\n": 1})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "inputtype (input_type?), stream, 1 more"
    number = answer.headers["x-request-id"]
    server.wait_until(lambda: number in server.log, "logged")
    (line,) = [json.loads(row) for row in server.log.splitlines() if number in row]
    assert line["ignored_fields"] == 3
    assert "inputtype" not in json.dumps(line), "names are the client's own"


@pytest.mark.parametrize("padding", [0, 100_000], ids=["small", "large"])
def test_known_fields_are_not(server: AppInProcess, padding: int) -> None:
    fields = {"model": MODEL, "input": "x", "user": "u" * padding, "encoding_format": "float"}
    fields |= {"input_type": None, "prompt_name": None, "truncation": None}
    for path in ("/v1/embeddings", "/tokenize"):
        answer = server.client.post(path, json=fields)
        assert answer.status_code == 200
        assert "x-ignored-fields" not in answer.headers
        answer = server.client.post(path, json={**fields, "Dimension": 3})
        assert answer.headers["x-ignored-fields"] == "Dimension (dimensions?)"


def test_names_that_are_near() -> None:
    known = frozenset({"input_type", "prompt_name", "/v1/embeddings", "/v1/models"})
    assert nearest("promptName", known) == "prompt_name"
    assert nearest("input-type", known) == "input_type"
    assert nearest("/v1/embedings", known) == "/v1/embeddings"
    assert nearest("temperature", known) is None
    assert ignored_names([f"f{n}" for n in range(1000)], known) == "f0, f1, f2, f3, f4, 995 more"
    assert ignored_names(["ü", "x" * 41, "a b", "\r\n"], known) == "4 more"
