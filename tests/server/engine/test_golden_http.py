"""The authors' own values, through HTTP; and one text, one vector, however it comes."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import golden_cases
from tests.server.processes import ServerProcess, serving

pytestmark = pytest.mark.process

TOLERANCE = 2e-5
TRUNCATED = {"truncated": 12, "truncated query": 24}
CASES = {case["name"]: case for case in golden_cases()}


def fields_of(case: dict[str, Any]) -> dict[str, Any]:
    """The empty text goes as ids: as a string it is a 400."""
    if case["texts"] == [""]:
        return {"input": case["token_ids"][0]}
    return {"input": case["texts"], "prompt": case["instruction"]}


def check(server: ServerProcess, case: dict[str, Any], **extra: object) -> None:
    """Ids by /tokenize, vectors as floats and as base64, usage by the ids."""
    fields = {**fields_of(case), **extra}
    if "prompt" in fields:
        tokenized = server.client.post("/tokenize", json=fields).json()["data"]
        assert [item["ids"] for item in tokenized] == case["token_ids"]
        assert {item["instruction_tokens"] for item in tokenized} == {case["instruction_lens"]}
    expected = np.array(case["embeddings"], dtype=np.float32)
    floats = server.embed(**fields, encoding_format="float").json()
    encoded = server.embed(**fields, encoding_format="base64").json()
    got = np.array([item["embedding"] for item in floats["data"]], dtype=np.float32)
    decoded = np.stack(
        [np.frombuffer(base64.b64decode(i["embedding"]), "<f4") for i in encoded["data"]]
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(decoded, got)
    assert [item["index"] for item in floats["data"]] == list(range(len(expected)))
    tokens = sum(map(len, case["token_ids"]))
    assert floats["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


@pytest.mark.parametrize("name", sorted(CASES.keys() - TRUNCATED.keys()))
def test_golden_case(golden_server: ServerProcess, name: str) -> None:
    check(golden_server, CASES[name])


@contextmanager
def limited(model: Path, tmp_path: Path, limit: int) -> Iterator[ServerProcess]:
    with serving(model, "--max-input-tokens", str(limit), log=tmp_path / "log") as server:
        yield server


@pytest.mark.parametrize("name", sorted(TRUNCATED))
def test_truncated_golden_case(golden_checkpoint: Path, tmp_path: Path, name: str) -> None:
    case, limit = CASES[name], TRUNCATED[name]
    with limited(golden_checkpoint, tmp_path, limit) as server:
        check(server, case, truncate="END")
        refused = server.embed(**fields_of(case))
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert f"maximum context length is {limit} tokens" in error["message"]


def test_without_torchs_private_operations(golden_checkpoint: Path, tmp_path: Path) -> None:
    """It starts, says what it does without, and gives the authors' values."""
    options = ("--runner", "tests.server.runners:without_private_operations")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        (device,) = server.client.get("/info").json()["devices"]
        assert device["products"] == {"float32": "torch"}
        assert (device["dtype"], device["attention"]) == ("float32", "sdpa")
        assert server.says("products: float32 by torch"), server.log
        assert server.says("mkl (cannot be had: "), server.log
        check(server, CASES["passages"])


def test_the_empty_text_is_refused_as_a_string(golden_server: ServerProcess) -> None:
    assert golden_server.embed(input="").status_code == 400


TEXT = "Judo throws are allowed in freestyle wrestling."
OTHERS = ["x", "a somewhat longer text, to share a batch with", "tab\tand\nnewline " * 30]


def test_a_vector_does_not_depend_on_how_its_text_came(golden_server: ServerProcess) -> None:
    server = golden_server
    alone = server.vectors(input=TEXT)[0]
    ids = server.client.post("/tokenize", json={"input": TEXT}).json()["data"][0]["ids"]
    other_ids = [1, 315, 2]
    ways = {
        "list of one": server.vectors(input=[TEXT])[0],
        "first among others": server.vectors(input=[TEXT, *OTHERS])[0],
        "last among others": server.vectors(input=[*OTHERS, TEXT])[-1],
        "twice": server.vectors(input=[TEXT, "x", TEXT])[2],
        "ids": server.vectors(input=ids)[0],
        "list of ids": server.vectors(input=[other_ids, ids])[1],
        "passage": server.vectors(input=TEXT, input_type="passage")[0],
        "empty prompt": server.vectors(input=TEXT, prompt="")[0],
    }
    for way, vector in ways.items():
        np.testing.assert_allclose(vector, alone, rtol=0, atol=1e-5, err_msg=way)


def test_all_ways_to_ask_for_a_query_give_one_vector(golden_server: ServerProcess) -> None:
    server, case = golden_server, CASES["readme queries"]
    text, expected = case["texts"][0], case["embeddings"][0]
    task = "Given a question, retrieve passages that answer the question"
    for fields in (
        {"prompt": f"Instruct: {task}\nQuery: "},
        {"instruction": task},
        {"task": "NQ"},
        {"task": "nq", "input_type": "query"},
        {"input_type": "query"},
        {"input_type": "search_query"},
        {"prompt_name": "query"},
        {"model": "golden-embed-query"},
        {"model": "GOLDEN-EMBED-QUERY", "input_type": None, "task": None},
    ):
        got = server.vectors(input=text, **fields)[0]
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE, err_msg=f"{fields}")
