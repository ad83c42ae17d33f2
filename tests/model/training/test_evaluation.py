"""Scores against values worked out by hand, and the sets' file formats."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.training import commands, evaluation, metrics
from model.training.bm25 import BM25, words
from model.training.evaluation import Tasks
from model.training.examples import DataError

SMART = """.I 1
.T
Of cats
.A
Someone
.W
The cat sat
on a mat.
.X
1\t5\t1
.I 2
.W
Dogs bark at night.
"""


def letters(texts: Sequence[str], instruction: str) -> NDArray[np.float32]:
    """An embedder whose vectors count letters; the instruction does not matter."""
    rows = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts])
    rows = rows + 1e-3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_spearman() -> None:
    assert metrics.ranks(np.array([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2, 3.5, 1]
    assert metrics.spearman(np.array([1, 2, 3]), np.array([10, 20, 90])) == pytest.approx(1)
    assert metrics.spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    with_tie = metrics.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))
    assert with_tie == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_retrieval_scores() -> None:
    scores = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
    relevant = [{1: 1.0, 3: 1.0}, {}]  # the second query has none and is left out
    found = metrics.retrieval_scores(scores, relevant, k=3)
    ideal = 1 + 1 / np.log2(3)
    assert found["ndcg@3"] == pytest.approx((1 / np.log2(3)) / ideal)
    assert found["mrr@3"] == 0.5
    assert found["recall@100"] == 1
    graded = metrics.retrieval_scores(scores[:1], [{0: 1.0, 1: 3.0}], k=10)
    assert graded["ndcg@10"] == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))


def test_classification() -> None:
    train = np.array([[1, 0], [0.9, 0.1], [0, 1]])
    labels = ["x", "x", "y"]
    test = np.array([[1, 0.1], [0, 1]])
    assert metrics.knn_accuracy(train, labels, test, ["x", "y"], k=1) == 1
    assert metrics.knn_accuracy(train, labels, test, ["y", "y"], k=1) == 0.5
    assert metrics.logistic_accuracy(train, labels, test, ["x", "y"]) == 1


def test_clustering() -> None:
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(centre, 0.01, (20, 2)) for centre in ((0, 0), (5, 5))])
    assert metrics.v_measure(vectors, ["a"] * 20 + ["b"] * 20) == pytest.approx(1)


def test_bm25_prefers_rare_words_and_short_documents() -> None:
    documents = ["the cat sat on the mat", "cats and dogs and fish and birds", "a dog", "the"]
    scores = BM25(documents).scores(["cat", "dogs", "nothing"])
    assert scores[0].argmax() == 0
    assert scores[0][1] > 0
    assert scores[1].argmax() == 2
    assert not scores[2].any()
    # one document of two holds the word once, both of the same length: idf * 1
    assert BM25(["x y", "z y"]).scores(["x"])[0, 0] == pytest.approx(np.log(2))


def test_words() -> None:
    assert words("The studies of Cats, walking & is walked") == ["studi", "cat", "walk", "walk"]
    assert len({tuple(words(form)) for form in ("making", "makes", "make")}) == 1


def test_smart_collections(tmp_path: Path) -> None:
    (tmp_path / "x.ALL").write_text(SMART)
    (tmp_path / "x.QRY").write_text(".I 1\n.W\nwhere is the cat?\n.I 2\n.W\nunjudged\n")
    (tmp_path / "x.REL").write_text("     1      1\t0\t0.0\n")
    data = evaluation.read_retrieval(tmp_path)
    assert data.documents == ["Of cats The cat sat on a mat.", "Dogs bark at night."]
    assert (data.queries, data.relevant) == (["where is the cat?"], [{0: 1.0}])
    assert evaluation.score_bm25(data)["ndcg@10"] == 1
    assert evaluation.score_retrieval(letters, data, Tasks())["mrr@10"] == 1


def test_folders_of_json_lines(tmp_path: Path) -> None:
    corpus = [{"id": "a", "text": "cat", "title": "T"}, {"_id": "b", "text": "dog"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (tmp_path / "queries.jsonl").write_text('{"id": "1", "text": "cats"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tb\t2\n")
    data = evaluation.read_retrieval(tmp_path)
    assert (data.documents, data.relevant) == (["T cat", "dog"], [{1: 2.0}])
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "cat"}\n{"id": "b"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 2: KeyError\('text'\)"):
        evaluation.read_retrieval(tmp_path)


def test_evaluate_command(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = tmp_path / "sts.jsonl"
    pairs = [("a cat", "a cat", 5), ("a cat", "the cat", 4), ("a cat", "stock prices fell", 0)]
    rows = [{"first": a, "second": b, "score": s} for a, b, s in pairs]
    sts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = tmp_path / "labelled.csv"
    lines = [f"{word} {i},{word},{'test' if i < 2 else 'train'}" for word in "ab" for i in range(6)]
    labelled.write_text("text,category,split\n" + "\n".join(lines))
    arguments = Namespace(
        model=str(tiny_checkpoint), teacher=None, url=None, bm25=False, instructions=True,
        sts=[sts], retrieval=[], classification=[labelled], clustering=[labelled],
        dtype="float32", threads=1, max_tokens=64,
    )  # fmt: skip
    assert commands.evaluate(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["scores"].keys() == {str(sts), str(labelled)}
    # The same text twice is nearest whatever the model; three pairs have few possible orders.
    assert result["scores"][str(sts)]["spearman"] >= 0.5
    names = {"knn_accuracy", "logistic_accuracy", "v_measure"}
    assert result["scores"][str(labelled)].keys() == names
    for wrong, message in (
        ({"sts": [], "classification": [], "clustering": []}, "nothing to evaluate"),
        ({"bm25": True}, "--bm25 is a baseline of retrieval"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            commands.evaluate(Namespace(**{**vars(arguments), **wrong}))


def test_an_unusable_sts_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sts.csv"
    file.write_text("a\tb\tc\td\t5.0\tx\ty\na\tb\tc\td\n")
    with pytest.raises(DataError, match=r"sts\.csv, line 2"):
        evaluation.read_sts(file)
