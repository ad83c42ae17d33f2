"""The sibling families over HTTP, as clients ask for them, against their authors' values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.model.test_siblings import usable
from tests.server.processes import ServerProcess, serving
from tests.siblings import SIBLINGS, golden_cases, write_sibling

pytestmark = pytest.mark.process
LIMITS = [(name, 512) for name in SIBLINGS] + [("e5-mistral", 12), ("gritlm", 12)]


@pytest.fixture(scope="module", params=LIMITS, ids=str)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, ServerProcess]]:
    name, limit = request.param
    folder = write_sibling(tmp_path_factory.mktemp("siblings") / name, name)
    options = [
        "--served-model-name",
        "golden-embed",
        "--max-input-tokens",
        str(limit),
        "--dtype",
        "float32",
        "--truncate",
        "end",
    ]
    if limit == 512:  # the other two are told what they are
        options += ["--family", SIBLINGS[name].family]
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(folder, *options, log=log) as server:
        yield name, limit, server


def fields(case: dict[str, Any]) -> dict[str, Any]:
    if case["side"] == "raw":
        return {"prompt": ""}
    if case.get("road") == "direct":
        return {"prompt": case["prefix"], "suffix": case["suffix"]}
    asked: dict[str, Any] = {"input_type": case["side"]}
    if case["side"] == "query" and (case["task"] is not None or case.get("suffix")):
        asked["instruction"] = case["task"] or ""
    if case.get("examples"):
        asked["examples"] = case["examples"]
    return asked


def test_the_authors_vectors(served: tuple[str, int, ServerProcess]) -> None:
    name, limit, server = served
    compared = 0
    for case in golden_cases(name):
        if case["max_length"] != limit or case.get("config"):
            continue
        for index in usable(name, case):
            text, expected = case["texts"][index], case["embeddings"][index]
            answer = server.embed(input=text, **fields(case), encoding_format="float")
            if expected is None or text == "":
                assert answer.status_code == 400, (case["name"], text)
                continue
            assert answer.status_code == 200, answer.text
            vector = answer.json()["data"][0]["embedding"]
            np.testing.assert_allclose(vector, expected, rtol=0, atol=2e-5, err_msg=case["name"])
            compared += 1
    assert compared >= 4
