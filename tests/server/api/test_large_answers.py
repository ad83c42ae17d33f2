"""Large answers come in pieces, and whole. Real processes: chunks are made by the HTTP server."""

from __future__ import annotations

import base64
import json
import socket
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.batch import Encoding
from model.prompts import Prompt
from model.tokenizer import NVEmbedTokenizer
from server.api.serialize import PIECE_VALUES, embeddings_body, embeddings_pieces, tokens_pieces
from server.api.vector_format import VectorFormat
from tests.checkpoints import claim_width
from tests.server.processes import ServerProcess, serving
from tests.server.runners import vector_of

MODEL = "golden-embed"


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


def vectors_of(answer: httpx.Response) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    return [item["embedding"] for item in answer.json()["data"]]


@pytest.mark.process
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


@pytest.mark.process
def test_answers_that_are_not_so_large_have_a_length(wide_server: ServerProcess) -> None:
    for count in (1, 30):
        answer = wide_server.embed(input=[f"text {n}" for n in range(count)])
        assert int(answer.headers["content-length"]) == len(answer.content)


@pytest.mark.process
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


@pytest.mark.process
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


@pytest.mark.process
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
        how: dict[str, Any] = {"model": "m", "tokens": 5, "how": VectorFormat(base64=packed)}
        pieces = list(embeddings_pieces(vectors, **how))
        assert max(map(len, pieces)) < 200_000
        assert b"".join(pieces) == embeddings_body(vectors, **how)
        assert len(json.loads(b"".join(pieces))["data"]) == 70
    encodings = [Encoding(np.arange(n, dtype=np.int32), 1) for n in range(2, 1000)]
    pieces = list(tokens_pieces(encodings, Prompt(('a "prefix"',)), 512))
    assert max(map(len, pieces)) < 10 * PIECE_VALUES
    whole = json.loads(b"".join(pieces))
    assert [item["ids"] for item in whole["data"]] == [e.ids.tolist() for e in encodings]
    assert (whole["prefix"], whole["max_input_tokens"]) == ('a "prefix"', 512)


@pytest.mark.parametrize("packed", [False, True])
def test_a_vector_is_let_go_when_it_is_written(packed: bool) -> None:
    """Batches hold vectors of many requests: the last to go would free all of them at once."""
    vectors = [np.full(4096, 0.1, np.float32) for _ in range(40)]
    alive = [weakref.ref(vector) for vector in vectors]
    pieces = embeddings_pieces(vectors, model="m", tokens=5, how=VectorFormat(base64=packed))
    del vectors
    left = []
    for _ in pieces:
        left.append(sum(one() is not None for one in alive))
    steps = [before - after for before, after in zip([40, *left], left, strict=False)]
    assert max(steps) <= 8
    assert left[-1] == 0
