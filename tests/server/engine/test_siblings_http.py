"""The families over HTTP: as clients ask for them, against their authors' values; and as `evaluate`
and `mine` ask for them, against the same model in this process."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.encoder import Encoder
from model.families import Side
from model.training import evaluation
from model.training.embedders import LocalEmbedder
from model.training.evaluation import NamedSet
from model.training.examples import read_examples
from model.training.mining import mine
from model.training.remote import ServerEmbedder
from server import cli
from tests.model.test_siblings import usable
from tests.server.processes import ServerProcess, serving
from tests.siblings import SIBLINGS, golden_cases, write_sibling

pytestmark = pytest.mark.process
LIMITS = [(name, 512) for name in SIBLINGS] + [("e5-mistral", 12), ("gritlm", 12)]


@pytest.fixture(scope="module", params=LIMITS, ids=str)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, ServerProcess, Path]]:
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
        yield name, limit, server, folder


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


def test_the_authors_vectors(served: tuple[str, int, ServerProcess, Path]) -> None:
    name, limit, server, _ = served
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


WORDS = ["tea", "rain", "judo", "a river", "the moon", "bread", "an exam", "a guitar"]
TASK = "Find what is meant"
SIDES: tuple[Side, ...] = ("query", "passage")


class ByHand:
    """An Embedder that writes the family's template itself, and keeps what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.encoder = Encoder(folder, device="cpu", dtype="float32", threads=1)
        self.family = self.encoder.tokenizer.family
        self.vectors: list[tuple[Sequence[str], Side, str, NDArray[np.float32]]] = []

    def __call__(self, texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
        takes = self.family.name not in ("bidirectional-mean", "nemotron-3-embed")
        prompt = self.family.prompt(side, task if takes else "")
        rows = self.encoder.encode(texts, prompt)
        self.vectors.append((texts, side, task, rows))
        return rows


def write_sets(folder: Path) -> list[NamedSet]:
    """Of retrieval, STS and labels; and pairs.jsonl, of examples to mine for."""
    documents = [f"All about {word}, and more." for word in WORDS]
    queries = [f"where is {word}?" for word in WORDS]
    for name, texts in (("corpus", documents), ("queries", queries)):
        rows = [{"id": str(number), "text": text} for number, text in enumerate(texts)]
        write_lines(folder / f"{name}.jsonl", rows)
    (folder / "qrels.tsv").write_text("".join(f"{n}\t{n}\t1\n" for n in range(len(WORDS))))
    both = [(first, second) for first in WORDS[:4] for second in WORDS[4:]]
    rows = [{"first": a, "second": b, "score": n * n % 7} for n, (a, b) in enumerate(both)]
    write_lines(folder / "sts.jsonl", rows)
    lines = [
        f"{verb} {word},{verb},{'test' if number % 2 else 'train'}"
        for verb in ("buy", "sell")
        for number, word in enumerate(WORDS)
    ]
    (folder / "labelled.csv").write_text("text,label,split\n" + "\n".join(lines) + "\n")
    pairs = zip(queries, documents, ("", TASK) * 4, strict=True)
    rows = [{"query": query, "positive": text, "task": task} for query, text, task in pairs]
    write_lines(folder / "pairs.jsonl", rows)
    return [
        evaluation.named_set(f"{folder}={TASK}", "retrieval"),
        evaluation.named_set(f"{folder / 'sts.jsonl'}={TASK}", "sts"),
        evaluation.named_set(f"{folder / 'labelled.csv'}={TASK}", "classification"),
    ]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def written_by(capfd: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What stands on stdout and stderr since the last call."""
    for handler in logging.getLogger().handlers:
        handler.flush()  # a thread writes the log
    return capfd.readouterr()


def check_commands(
    folder: Path,
    url: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`evaluate` and `mine` locally and by a server, and what they come to by hand."""
    retrieval, sts, labelled = write_sets(tmp_path)
    by_hand = ByHand(folder)
    encoder, family = by_hand.encoder, by_hand.family
    expected = {
        retrieval.name: evaluation.score_retrieval(
            by_hand, evaluation.read_retrieval(retrieval.path), retrieval
        ),
        sts.name: evaluation.score_sts(by_hand, evaluation.read_sts(sts.path), sts),
        labelled.name: evaluation.score_labelled(
            by_hand, evaluation.read_labelled(labelled.path), labelled, ("knn", "logistic")
        ),
    }
    asked = {(side, task) for _, side, task, _ in by_hand.vectors}
    assert asked == {("query", TASK), ("passage", "")}
    for embed in (LocalEmbedder(encoder), ServerEmbedder(url)):
        for texts, side, task, rows in by_hand.vectors:
            np.testing.assert_allclose(embed(texts, side, task), rows, rtol=0, atol=2e-5)
        for bare in SIDES:  # without a task each keeps what the family writes around it
            rows = encoder.encode(WORDS, family.prompt(bare))
            np.testing.assert_allclose(embed(WORDS, bare), rows, rtol=0, atol=2e-5)
        as_query, as_passage = embed(WORDS, "query", TASK), embed(WORDS, "passage")
        assert np.abs(as_query - as_passage).max() > 1e-2

    sets = ["--retrieval", retrieval.name, "--sts", sts.name, "--classification", labelled.name]
    local = ["--model", str(folder), "--dtype", "float32", "--threads", "1"]
    mined = list(mine(read_examples(tmp_path / "pairs.jsonl"), by_hand, count=2, threshold=1))
    written_by(capfd)
    for where in (local, ["--url", url]):
        assert cli.main(["evaluate", *where, *sets]) == 0
        out, err = written_by(capfd)
        found = json.loads(out.splitlines()[-1])["scores"]
        for name, scores in expected.items():
            assert found[name] == pytest.approx({k: float(v) for k, v in scores.items()}), name
        assert err.count("takes no instruction") == (family.template is None)  # it is said once

        target = tmp_path / "mined.jsonl"
        call = ["mine", str(tmp_path / "pairs.jsonl"), "-o", str(target), *where]
        assert cli.main([*call, "--count", "2", "--threshold", "1"]) == 0
        assert read_examples(target) == mined
        written_by(capfd)
    assert any(example.negatives for example in mined)


def test_evaluate_and_mine_write_the_template_of_the_family(
    served: tuple[str, int, ServerProcess, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, limit, server, folder = served
    if limit < 512:
        pytest.skip("this server cuts the texts")
    check_commands(folder, server.url, tmp_path, capfd)


def test_evaluate_and_mine_write_nv_embeds(
    golden_server: ServerProcess,
    golden_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    check_commands(golden_checkpoint, golden_server.url, tmp_path, capfd)
