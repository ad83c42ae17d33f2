"""What a request may cost before and after it is admitted, and what is said of odd ones."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.batch import Encoding
from model.tokenizer import NVEmbedTokenizer, Truncation
from server.api.hints import ignored_names, nearest
from server.api.serialize import PIECE_VALUES, embeddings_body, embeddings_pieces, tokens_pieces
from server.engine.inputs import AbandonedError, InputTokenizer
from server.engine.interface import EncodingOptions
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_TOKENS
from tests.checkpoints import claim_width
from tests.server.processes import ServerProcess, serving
from tests.server.runners import vector_of

MODEL = "golden-embed"
JSON = {"content-type": "application/json"}
LONG = "a sentence of some words, " * 30  # more than is tokenized on the event loop


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("admission") / "log"
    options = ("--runner", "tests.server.runners:Hashing", "--log-format", "json")
    with serving(golden_checkpoint, *options, log=log) as server:
        yield server


@pytest.fixture(scope="module")
def wide_server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """4,096 values for each input."""
    folder = tmp_path_factory.mktemp("wide")
    model = claim_width(golden_checkpoint, folder / "golden-embed", 4096)
    options = ("--runner", "tests.server.runners:Wide", "--allow-truncated-dimensions")
    with serving(model, *options, log=folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer(golden_checkpoint: Path) -> NVEmbedTokenizer:
    return NVEmbedTokenizer.from_dir(golden_checkpoint)


def post(server: ServerProcess, body: bytes, path: str = "/v1/embeddings", **headers: str) -> Any:
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
    server: ServerProcess, fields: bytes, meant: dict[str, Any], padding: int
) -> None:
    body = b'{"model": "%b", %b, "user": "%b"}' % (MODEL.encode(), fields, b"u" * padding)
    assert vectors_of(post(server, body)) == server.vectors(**meant)


@pytest.mark.parametrize("padding", [0, 100_000], ids=["small", "large"])
def test_a_byte_order_mark_is_skipped(server: ServerProcess, padding: int) -> None:
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
    server: ServerProcess, body: bytes, param: str | None, words: str
) -> None:
    answer = post(server, body)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == param
    assert words in error_of(answer)["message"]


def test_large_bodies_mean_what_small_ones_mean(
    server: ServerProcess, tokenizer: NVEmbedTokenizer
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
def test_an_encoded_body_is_a_415_that_names_the_header(server: ServerProcess, coding: str) -> None:
    body = gzip.compress(json.dumps({"model": MODEL, "input": "x"}).encode())
    for path in ("/v1/embeddings", "/tokenize"):
        answer = post(server, body, path, **{"content-encoding": coding})
        assert answer.status_code == 415
        assert f"Content-Encoding: '{coding.lower()}'" in error_of(answer)["message"]


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_an_encoding_that_is_none_is_fine(server: ServerProcess, coding: str) -> None:
    body = json.dumps({"model": MODEL, "input": "x"}).encode()
    assert post(server, body, **{"content-encoding": coding}).status_code == 200


@pytest.mark.parametrize(
    "given", ["application/json, application/json", "text/plain", "multipart/form-data; boundary=x"]
)
def test_a_wrong_content_type_is_named(server: ServerProcess, given: str) -> None:
    body = json.dumps({"model": MODEL, "input": "x"}).encode()
    answer = post(server, body, **{"content-type": given})
    assert answer.status_code == 415
    assert f"came as '{given}'" in error_of(answer)["message"]
    parameters = "application/json; charset=utf-8; charset=utf-8"
    assert post(server, body, **{"content-type": parameters}).status_code == 200


# What was meant


def test_ignored_fields_are_named_in_a_header(server: ServerProcess) -> None:
    answer = server.embed(input="x", inputtype="query", stream=False, **{"no name\n": 1})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "inputtype (input_type?), stream, 1 more"
    number = answer.headers["x-request-id"]
    server.wait_until(lambda: number in server.log, "logged")
    (line,) = [json.loads(row) for row in server.log.splitlines() if number in row]
    assert line["ignored_fields"] == 3
    assert "inputtype" not in json.dumps(line), "names are the client's own"


@pytest.mark.parametrize("padding", [0, 100_000], ids=["small", "large"])
def test_known_fields_are_not(server: ServerProcess, padding: int) -> None:
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


def test_models_are_found_without_v1(server: ServerProcess) -> None:
    for path in ("/models", "/models/golden-embed", "/models/golden-embed-query"):
        assert server.client.get(path).json() == server.client.get(f"/v1{path}").json()
    assert server.client.get("/models/other").status_code == 404
    metrics = server.client.get("/metrics").text
    assert 'nv_embed_requests_total{route="models",status="404"} 1.0' in metrics


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v1/embeddings", "/v1/embeddings"),
        ("//v1/embeddings", "/v1/embeddings"),
        ("/v1/embeddings/", "/v1/embeddings"),
        ("/v1/embedding", "/v1/embeddings"),
        ("/V1/Embeddings", "/v1/embeddings"),
        ("/v1/model", "/v1/models"),
        ("/tokenise", "/tokenize"),
        ("/heath", "/health"),
    ],
)
def test_a_route_that_is_nearly_one(server: ServerProcess, path: str, meant: str) -> None:
    answer = httpx.post(httpx.URL(server.url, path=path), json={})
    assert answer.status_code == 404
    assert error_of(answer)["message"].endswith(f"Unknown route POST {path}: did you mean {meant}?")


def test_other_unknown_routes(server: ServerProcess) -> None:
    for base in ("/", "/v1", "/v1/"):
        root = error_of(server.client.get(base))["message"]
        for pointer in ("POST /v1/embeddings", "/v1/models", "/docs"):
            assert pointer in root
    far = error_of(server.client.get("/v1/chat/completions"))["message"]
    assert far == "Unknown route GET /v1/chat/completions"
    assert len(error_of(server.client.get("/" + "x" * 5000))["message"]) < 300


@pytest.mark.parametrize(
    ("method", "path", "use"),
    [("GET", "/v1/embeddings", "POST"), ("GET", "/tokenize", "POST"), ("POST", "/info", "GET")],
)
def test_a_wrong_method_says_the_right_one(
    server: ServerProcess, method: str, path: str, use: str
) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == 405
    assert error_of(answer)["message"] == f"{path} does not take {method}: use {use}"
    assert answer.headers["allow"] == use


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_pages_say_what_they_need(server: ServerProcess, path: str) -> None:
    page = server.client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.count("scripts from cdn.jsdelivr.net") == 2, "hidden, and without scripts"
    assert "<script onerror=\"document.getElementById('no-scripts').hidden = false\"" in page.text
    assert 'id="no-scripts" hidden' in page.text
    assert "'/openapi.json'" in page.text or '"/openapi.json"' in page.text


# Large answers


def test_a_large_answer_comes_in_pieces_and_whole(
    wide_server: ServerProcess, tokenizer: NVEmbedTokenizer
) -> None:
    texts = [f"text {n}" for n in range(300)]
    plain = np.array([vector_of(tokenizer.encode(t, max_tokens=99).ids) for t in texts])
    expected = np.tile(plain, 64) / 8
    for dimensions in (None, 1024):
        answer = wide_server.embed(input=texts, dimensions=dimensions)
        assert answer.headers["transfer-encoding"] == "chunked"
        factor = 1 if dimensions is None else 2  # of length 1 again
        shown = expected[:, :dimensions] * factor
        np.testing.assert_allclose(vectors_of(answer), shown, atol=1e-6)
        assert [item["index"] for item in answer.json()["data"]] == list(range(300))
        packed = wide_server.embed(input=texts, dimensions=dimensions, encoding_format="base64")
        rows = [base64.b64decode(item["embedding"]) for item in packed.json()["data"]]
        np.testing.assert_allclose(np.frombuffer(b"".join(rows), "<f4"), shown.ravel(), atol=1e-6)


def test_answers_that_are_not_so_large_have_a_length(wide_server: ServerProcess) -> None:
    for count in (1, 30):
        answer = wide_server.embed(input=[f"text {n}" for n in range(count)])
        assert int(answer.headers["content-length"]) == len(answer.content)


def test_http_1_0_gets_no_chunks(wide_server: ServerProcess) -> None:
    body = json.dumps({"model": MODEL, "input": [f"t{n}" for n in range(200)]}).encode()
    head = b"POST /v1/embeddings HTTP/1.0\r\ncontent-type: application/json\r\n"
    host, port = wide_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        received = b"".join(iter(lambda: client.recv(1 << 20), b""))
    lines, _, content = received.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(content) in lines
    assert len(json.loads(content)["data"]) == 200


def test_a_client_that_leaves_midway_costs_no_more(wide_server: ServerProcess) -> None:
    body = json.dumps({"model": MODEL, "input": [f"m{n}" for n in range(2048)]}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    host, port = wide_server.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    wide_server.wait_for_metric("nv_embed_inflight_bytes", 0)
    assert wide_server.embed(input="x").status_code == 200


def test_a_drain_waits_for_an_answer_in_pieces(golden_checkpoint: Path, tmp_path: Path) -> None:
    model = claim_width(golden_checkpoint, tmp_path / "golden-embed", 4096)
    options = ("--runner", "tests.server.runners:Wide")
    with serving(model, *options, log=tmp_path / "log") as server:
        with server.client.stream(
            "POST",
            "/v1/embeddings",
            json={"model": MODEL, "input": [f"m{n}" for n in range(1000)]},
        ) as answer:
            pieces = answer.iter_bytes()
            first = next(pieces)
            server.process.terminate()
            time.sleep(0.3)
            rest = b"".join(pieces)
        assert len(json.loads(first + rest)["data"]) == 1000


def test_pieces_are_small_and_the_same_answer() -> None:
    vectors = list(np.random.default_rng(3).standard_normal((70, 4096)).astype(np.float32))
    for packed in (False, True):
        how: dict[str, Any] = {"model": "m", "tokens": 5, "base64": packed}
        pieces = list(embeddings_pieces(vectors, **how))
        assert max(map(len, pieces)) < 20 * PIECE_VALUES
        assert b"".join(pieces) == embeddings_body(vectors, **how)
        assert len(json.loads(b"".join(pieces))["data"]) == 70
    encodings = [Encoding(np.arange(n, dtype=np.int32), 1) for n in range(2, 1000)]
    pieces = list(tokens_pieces(encodings, 'a "prefix"', 512))
    assert max(map(len, pieces)) < 10 * PIECE_VALUES
    whole = json.loads(b"".join(pieces))
    assert [item["ids"] for item in whole["data"]] == [e.ids.tolist() for e in encodings]
    assert (whole["prefix"], whole["max_input_tokens"]) == ('a "prefix"', 512)


# /tokenize is work as well


def test_tokenize_is_admitted_as_embeddings_are(golden_checkpoint: Path, tmp_path: Path) -> None:
    """While the queue is full, it is a 429 that says when to come back."""
    options = ("--runner", "tests.server.runners:Hashing", "--max-queued-tokens", "300000")
    env = {"FAKE_SECONDS": "1.5"}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        full = ["word " * 1000] * 250
        with ThreadPoolExecutor(2) as clients:
            waiting = [
                clients.submit(server.embed, input="x"),
                clients.submit(server.embed, input=full),
            ]
            server.wait_until(lambda: server.metric("nv_embed_queued_tokens") > 200_000, "full")
            refused = server.client.post("/tokenize", json={"input": full})
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            assert error_of(refused)["code"] == "rate_limit_exceeded"
            assert server.client.post("/tokenize", json={"input": LONG}).status_code == 200
            assert all(future.result().status_code == 200 for future in waiting)


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings"])
def test_clients_that_left_do_not_hold_up_others(server: ServerProcess, path: str) -> None:
    """Each would be a second of work; what is not begun is dropped, what is begun ends early."""
    body = json.dumps({"model": MODEL, "input": ["many words " * 180] * 2048, "truncate": "END"})
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    raw = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
    assert len(body) > 4_000_000
    for _ in range(6):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(raw)
    begin = time.monotonic()
    server.wait_for_metric("nv_embed_inflight_bytes", 0)
    assert server.client.post("/tokenize", json={"input": LONG}).status_code == 200
    assert time.monotonic() - begin < 5, "six such requests take longer"


def test_work_that_nobody_waits_for_ends_early(tokenizer: NVEmbedTokenizer) -> None:
    inputs = InputTokenizer(tokenizer, 32_768, Truncation.NONE)
    asked: list[float] = []

    def abandoned() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 2

    with pytest.raises(AbandonedError):
        inputs.tokenize(["some words " * 100] * 2048, EncodingOptions(), abandoned)
    assert len(asked) == 3


def test_a_request_of_too_many_tokens_is_not_tokenized_to_its_end(
    tokenizer: NVEmbedTokenizer,
) -> None:
    asked: list[int] = []
    inputs = InputTokenizer(tokenizer, 32_768, Truncation.NONE)
    texts = ["x y z a b c d e f g " * 50] * 2048  # 2 million tokens, or a sixteenth of that
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_REQUEST_TOKENS} tokens"):
        inputs.tokenize(texts, EncodingOptions(), lambda: bool(asked.append(1)))
    assert 0 < len(asked) < 8, "of eight parts"


@pytest.mark.parametrize(
    "text",
    ["word " * 60_000, "🙂" * 100_000, "\ufdfa" * 100_000, " " * 300_000, "e\u0301" * 100_000],
    ids=["words", "emoji", "ligatures", "spaces", "marks"],
)
@pytest.mark.parametrize("as_instruction", [False, True])
def test_a_long_text_does_not_keep_the_interpreter(
    tokenizer: NVEmbedTokenizer, text: str, as_instruction: bool
) -> None:
    """Another thread goes on."""
    done = threading.Event()

    def work() -> None:
        if as_instruction:
            tokenizer.pool_start(text)
        else:
            tokenizer.encode(text, max_tokens=32_768, truncate=Truncation.END)
        done.set()

    thread = threading.Thread(target=work)
    begin = last = time.monotonic()
    longest = 0.0
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    thread.join()
    taken = time.monotonic() - begin
    assert longest < max(taken / 2, 0.05), f"stopped for {longest:.3f} of {taken:.3f} s"


def test_checksum_of_a_gzip_body_is_not_looked_at(server: ServerProcess) -> None:
    """A header that lies is refused by its name, too, and costs no decoding."""
    body = zlib.compress(b"0" * 10_000_000)
    answer = post(server, body, **{"content-encoding": "deflate"})
    assert answer.status_code == 415
