"""Several vectors of one text, and one vector of a text that is too long, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batch import Encoding, RunnerOptions
from model.chunks import Chunks
from model.prompts import NO_PROMPT
from model.runner import ModelRunner
from model.tokenizer import NVEmbedTokenizer
from tests.server.processes import ServerProcess, run_cli, serving

pytestmark = pytest.mark.process
TEXT = "The committee met twice, and agreed on nothing. Ünïcode 🙂 ends it. A river runs by. " * 3
LONG = "The committee met twice, and agreed on nothing of what had been said before. " * 20
LIMIT = 128


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    options = ("--max-input-tokens", str(LIMIT), "--cache-bytes", "1000000")
    log = tmp_path_factory.mktemp("chunks") / "log"
    with serving(golden_checkpoint, *options, log=log) as ready:
        yield ready


@pytest.fixture(scope="module")
def runner(golden_checkpoint: Path) -> ModelRunner:
    return ModelRunner(RunnerOptions(str(golden_checkpoint), dtype="float32", threads=1))


@pytest.fixture(scope="module")
def tokenizer(golden_checkpoint: Path) -> NVEmbedTokenizer:
    return NVEmbedTokenizer.from_dir(golden_checkpoint)


def answer(server: ServerProcess, **fields: object) -> Any:
    response = server.embed(**fields)
    assert response.status_code == 200, response.text
    return response.json()


def vectors_in(body: Any) -> np.ndarray:
    return np.array([item["embedding"] for item in body["data"]])


def test_a_vector_for_each_out_of_one_forward(
    server: ServerProcess, tokenizer: NVEmbedTokenizer, runner: ModelRunner
) -> None:
    expected = tokenizer.spans(TEXT, NO_PROMPT, Chunks("size", size=9), max_tokens=LIMIT)
    names = ("nv_embed_batch_tokens_count", "nv_embed_batch_tokens_sum")
    before = [server.metric(name) for name in names]
    body = answer(server, input=TEXT, chunks=9)
    after = [server.metric(name) for name in names]
    ran = [new - old for new, old in zip(after, before, strict=True)]
    assert ran == [1, len(expected[0].ids)], "one forward, of each token once"
    assert body["usage"]["prompt_tokens"] == len(expected[0].ids)
    np.testing.assert_allclose(vectors_in(body), runner.embed(expected), rtol=0, atol=1e-5)
    for index, (item, encoding) in enumerate(zip(body["data"], expected, strict=True)):
        assert item["index"] == index
        assert encoding.span is not None
        assert item["chunk"] == {
            "characters": list(encoding.span.characters),
            "tokens": list(encoding.span.tokens),
        }
    again = answer(server, input=TEXT, chunks=9)
    assert again == body, "from the cache"
    # All are known but the last two, and what was known is not what a whole text has.
    some = answer(server, input=TEXT, chunks={"tokens": [[0, 9], [9, 18], [3, 5], [4, 8]]})
    np.testing.assert_allclose(vectors_in(some)[:2], vectors_in(body)[:2], rtol=0, atol=1e-6)
    whole = vectors_in(answer(server, input=TEXT))
    np.testing.assert_allclose(
        whole, runner.embed([tokenizer.encode(TEXT, max_tokens=LIMIT)]), rtol=0, atol=1e-5
    )


def test_of_a_query_and_as_bytes(server: ServerProcess) -> None:
    runs = [[0, 24], [25, 48]]
    query = answer(server, input=TEXT, chunks=runs, input_type="query")
    passage = answer(server, input=[TEXT], chunks={"characters": runs})
    assert [item["chunk"]["characters"] for item in query["data"]] == [[0, 24], [25, 47]]
    assert np.abs(vectors_in(query) - vectors_in(passage)).max() > 1e-3
    packed = answer(server, input=TEXT, chunks=runs, encoding_format="base64", output_dtype="int8")
    assert [len(item["embedding"]) for item in packed["data"]] == [88, 88]


@pytest.mark.parametrize(
    ("chunks", "param"),
    [
        *((value, "chunks") for value in (0, -1, True, "9", 1.5, [], {}, {"words": [[0, 1]]})),
        *((value, "chunks") for value in ([[0, 1, 2]], [[3, 3]], [["a", "b"]], [[0, 1]] * 2049)),
        ({"tokens": [[0, 2], [5, 999]]}, "chunks[1]"),
        ([[0, 5], [5000, 5001]], "chunks[1]"),
    ],
)
def test_what_they_cannot_be(server: ServerProcess, chunks: object, param: str) -> None:
    response = server.embed(input=TEXT, chunks=chunks)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [TEXT, TEXT]}, "chunks"),
        ({"input": [1, 500, 2]}, "chunks"),
        ({"input": TEXT, "truncate": "END"}, "chunks"),
        ({"input": TEXT, "truncate": "AVERAGE"}, "chunks"),
        ({"input": TEXT, "truncate_prompt_tokens": 5}, "chunks"),
        ({"input": LONG}, "input"),
    ],
)
def test_what_has_none(server: ServerProcess, fields: dict[str, object], param: str) -> None:
    response = server.embed(chunks=5, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param, response.text


def weighted_mean(rows: np.ndarray, weights: list[int]) -> np.ndarray:
    total = np.average(rows.astype(np.float64), axis=0, weights=weights)
    return np.asarray(total / np.linalg.norm(total))


@pytest.mark.parametrize("fields", [{}, {"input_type": "query"}, {"prompt": "about: "}])
def test_a_long_text_is_the_mean_of_its_parts(
    server: ServerProcess, runner: ModelRunner, fields: dict[str, str]
) -> None:
    inputs = ["short", LONG, "also short", LONG[:900]]
    body = answer(server, input=inputs, truncate="AVERAGE", **fields)
    assert "x-nv-embed-truncated" not in server.embed(input=LONG, truncate="average").headers
    cut = server.client.post("/tokenize", json={"input": inputs, "truncate": "AVERAGE", **fields})
    items = cut.json()["data"]
    assert [item["index"] for item in items] == sorted(item["index"] for item in items)
    assert max(item["count"] for item in items) == LIMIT
    assert body["usage"]["prompt_tokens"] == sum(item["count"] for item in items)
    whole = server.client.post("/tokenize", json={"input": inputs, "truncate": "NONE", **fields})
    assert whole.status_code == 400, "it is opt-in"
    for index, vector in enumerate(vectors_in(body)):
        own = [item for item in items if item["index"] == index]
        ids = [np.array(item["ids"], dtype=np.int32) for item in own]
        encodings = [
            Encoding(each, item["instruction_tokens"]) for each, item in zip(ids, own, strict=True)
        ]
        around = common_start(ids) + 1 if len(ids) > 1 else 0
        weights = [len(each) - around for each in ids]
        expected = weighted_mean(runner.embed(encodings), weights)
        np.testing.assert_allclose(vector, expected, rtol=0, atol=1e-6)
    assert len(items) > len(inputs) + 1


def common_start(ids: list[np.ndarray]) -> int:
    """BOS and what a prompt puts before each part; the texts' own first ids differ."""
    length = min(map(len, ids))
    same = np.all([each[:length] == ids[0][:length] for each in ids], axis=0)
    return int(np.argmin(same))


def test_the_parts_hold_the_whole_text(server: ServerProcess, tokenizer: NVEmbedTokenizer) -> None:
    cut = server.client.post("/tokenize", json={"input": LONG, "truncate": "AVERAGE"}).json()
    together = [i for item in cut["data"] for i in item["ids"][1:-1]]
    assert together == tokenizer.encode(LONG, max_tokens=10_000).ids.tolist()[1:-1]


def test_what_cannot_be_averaged(server: ServerProcess) -> None:
    ids = [1, *range(500, 500 + LIMIT), 2]
    wrong: list[tuple[dict[str, object], str]] = [
        ({"input": ids, "token_ids": "model"}, "input"),
        ({"input": "word " * 400_000}, "input"),
        ({"input": LONG, "prompt": "word " * LIMIT}, "prompt"),
        ({"input": LONG, "truncation_side": "left"}, "truncation_side"),
        ({"input": LONG, "truncate_prompt_tokens": 20}, "truncate_prompt_tokens"),
        ({"input": LONG, "truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    ]
    for fields, param in wrong:
        response = server.embed(truncate="AVERAGE", **fields)
        assert response.status_code == 400, fields
        assert response.json()["error"]["param"] in (param, "input"), response.text


def test_in_a_batch_file(server: ServerProcess, golden_checkpoint: Path, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"input": TEXT, "chunks": 9},
        {"input": ["short", LONG], "truncate": "AVERAGE"},
        {"input": [TEXT, TEXT], "chunks": 9},
    ]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/embeddings", "body": fields}
        for i, fields in enumerate(asked)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--max-input-tokens", str(LIMIT), "--dtype", "float32", "--threads", "1")
    done = run_cli(
        *("encode", str(source), "-o", str(target), "--openai-batch"),
        *("--model", str(golden_checkpoint)),
        *options,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line)["response"] for line in target.read_text().splitlines()]
    assert [one["status_code"] for one in answers] == [200, 200, 400]
    for one, fields in zip(answers[:2], asked, strict=False):
        live = answer(server, **fields)
        assert one["body"]["usage"] == live["usage"]
        np.testing.assert_allclose(vectors_in(one["body"]), vectors_in(live), rtol=0, atol=1e-5)
        assert [i.get("chunk") for i in one["body"]["data"]] == [
            i.get("chunk") for i in live["data"]
        ]
