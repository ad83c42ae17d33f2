"""Scores against values worked out by hand, and the sets' file formats."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.families import Side
from model.training import commands, evaluation, metrics
from model.training.bm25 import BM25, words
from model.training.evaluation import NamedSet, named_set, task_texts
from model.training.examples import DataError
from server import cli

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


def letters(texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
    """An embedder whose vectors count letters; side and task do not matter."""
    rows = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts])
    rows = rows + 1e-3
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_spearman() -> None:
    assert metrics.ranks(np.array([3.0, 1.0, 3.0, 0.0])).tolist() == [3.5, 2, 3.5, 1]
    assert metrics.spearman(np.array([1, 2, 3]), np.array([10, 20, 90])) == pytest.approx(1)
    assert metrics.spearman(np.array([1, 2, 3]), np.array([3, 2, 1])) == pytest.approx(-1)
    assert metrics.spearman(np.array([1, 1, 1]), np.array([3, 2, 1])) == 0  # nothing is ranked
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


def test_ndcg_is_scikit_learns() -> None:
    """Independent reference: linear gains, the same discounts; no ties, which it averages."""
    from sklearn.metrics import ndcg_score

    rng = np.random.default_rng(2)
    scores = rng.permuted(np.tile(np.arange(50.0), (8, 1)), axis=1)
    grades = rng.integers(0, 4, (8, 50)).astype(float)
    relevant = [{place: grade for place, grade in enumerate(row) if grade} for row in grades]
    found = metrics.retrieval_scores(scores, relevant)["ndcg@10"]
    assert found == pytest.approx(ndcg_score(grades, scores, k=10))


def test_equal_scores_are_ranked_by_the_documents_order() -> None:
    scores = np.array([[0.5, 0.5, 0.5, 0.9]])
    for place, rank in ((3, 1), (0, 2), (1, 3), (2, 4)):
        found = metrics.retrieval_scores(scores, [{place: 1.0}])
        assert found["mrr@10"] == pytest.approx(1 / rank)
        assert found["ndcg@10"] == pytest.approx(1 / np.log2(rank + 1))


def test_a_relevant_document_that_the_corpus_lacks_is_not_found() -> None:
    found = metrics.retrieval_scores(np.array([[0.9, 0.1]]), [{0: 1.0, 2: 1.0}])
    assert found["ndcg@10"] == pytest.approx(1 / (1 + 1 / np.log2(3)))
    assert found["recall@100"] == 0.5


def test_classification() -> None:
    train = np.array([[1, 0], [0.9, 0.1], [0, 1]])
    labels = ["x", "x", "y"]
    test = np.array([[1, 0.1], [0, 1]])
    assert metrics.knn_accuracy(train, labels, test, ["x", "y"], k=1) == 1
    assert metrics.knn_accuracy(train, labels, test, ["y", "y"], k=1) == 0.5
    # Fewer rows than k: all vote. x has 1.0 + 0.9 / sqrt(0.82) of the cosine, y has 0.
    assert metrics.knn_accuracy(train, labels, np.array([[1.0, 0]]), ["x"], k=50) == 1
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
    assert evaluation.score_retrieval(letters, data, NamedSet("x", tmp_path))["mrr@10"] == 1


def test_folders_of_json_lines(tmp_path: Path) -> None:
    corpus = [{"id": "a", "text": "cat", "title": "T"}, {"_id": "b", "text": "dog"}]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    (tmp_path / "queries.jsonl").write_text('{"id": "1", "text": "cats"}\n')
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n1\tb\t2\n")
    data = evaluation.read_retrieval(tmp_path)
    assert (data.documents, data.relevant) == (["T cat", "dog"], [{1: 2.0}])
    assert data.missing == 0
    (tmp_path / "qrels.tsv").write_text("1\tb\t2\n1\tgone\t1\n1\tirrelevant\t0\n")
    data = evaluation.read_retrieval(tmp_path)
    assert (data.relevant, data.missing) == ([{1: 2.0, 2: 1.0}], 1)
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "cat"}\n{"id": "b"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 2: text is missing"):
        evaluation.read_retrieval(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("corpus.jsonl", '{"id": "a", "text": "x", "titel": "T"}', "'titel'; did you mean title?"),
        ("corpus.jsonl", '{"text": "x"}', "line 1: id is missing"),
        (
            "corpus.jsonl",
            '{"id": "b", "text": "x"}\n{"id": "b", "text": "y"}',
            "line 2: id 'b'",
        ),
        (
            "queries.jsonl",
            '{"id": "1", "text": "x", "lang": "en"}',
            "unknown key 'lang'. Known",
        ),
        ("queries.jsonl", '{"id": [1], "text": "x"}', "line 1: id is not a text"),
        ("qrels.tsv", "1\tb\t1\n1\tb\tnan\n", "line 2: the grade is 'nan', not a number"),
        ("qrels.tsv", "1\tb\n", "line 1: not query, document, grade"),
    ],
)
def test_a_misspelt_key_of_a_retrieval_set_is_named(
    tmp_path: Path, file: str, content: str, message: str
) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "b", "text": "dog", "metadata": {}}\n')
    (tmp_path / "queries.jsonl").write_text('{"id": 1, "text": "cats", "source": "s"}\n')
    (tmp_path / "qrels.tsv").write_text("1\tb\t2\n")
    assert evaluation.read_retrieval(tmp_path).relevant == [{0: 2.0}]
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        evaluation.read_retrieval(tmp_path)
    assert file in str(error.value)


class Recorder:
    """An embedder that remembers which texts came on which side, with which task."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], Side, str]] = []

    def __call__(self, texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
        self.calls.append((list(texts), side, task))
        return letters(texts, side, task)


def test_a_set_gets_the_task_that_stands_behind_its_path(tmp_path: Path) -> None:
    bank = named_set("train.csv=banking77", "classification")
    text = "Given a online banking query, find the corresponding intents"
    assert (bank.path, bank.query, bank.passage) == (Path("train.csv"), text, text)
    assert named_set("train.csv", "classification").query == "Classify user passages."
    assert named_set("train.csv", "clustering").query == "Identify categories in user passages."
    cisi = named_set("cisi/", "retrieval")
    assert cisi == NamedSet("cisi/", Path("cisi/"), task_texts("nq")[0])  # passages stay bare
    assert named_set("q/=Quora", "retrieval").passage.startswith("Given a question, retrieve q")
    assert named_set("a.csv=Find = it", "sts").query == "Find = it"
    assert named_set("a.csv=", "sts").query == ""
    existing = tmp_path / "a=sts.csv"
    existing.touch()
    assert named_set(str(existing), "sts").path == existing
    with pytest.raises(UnsupportedError, match="no task 'banking78'; known: ClimateFEVER"):
        named_set("train.csv=banking78", "classification")


def test_names_of_tasks_and_of_mtebs_variants() -> None:
    for name in ("Banking77Classification", "banking77", "Banking77Classification.v2"):
        assert task_texts(name)[0].startswith("Given a online banking query")
    for name in ("NQ", "NanoNQRetrieval", "NQHardNegatives"):
        assert task_texts(name) == (evaluation.TASKS["NQ"].query, "")
    assert task_texts("RedditClusteringP2P") != task_texts("reddit")


def test_who_is_asked_what(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "a cat"}\n')
    (tmp_path / "queries.jsonl").write_text('{"id": "1", "text": "cats?"}\n')
    (tmp_path / "qrels.tsv").write_text("1\ta\t1\n")
    (tmp_path / "sts.jsonl").write_text('{"first": "x", "second": "y", "score": 1}\n')
    (tmp_path / "c.csv").write_text("text,label,split\na,x,train\nb,y,train\nc,x,test\n")
    embed = Recorder()
    retrieval = named_set(f"{tmp_path}=FiQA2018", "retrieval")
    evaluation.score_retrieval(embed, evaluation.read_retrieval(tmp_path), retrieval)
    fiqa = "Given a financial question, retrieve relevant passages that answer the query"
    assert embed.calls == [(["cats?"], "query", fiqa), (["a cat"], "passage", "")]
    embed = Recorder()
    sts = named_set(f"{tmp_path}/sts.jsonl=Find alike", "sts")
    evaluation.score_sts(embed, evaluation.read_sts(sts.path), sts)
    labelled = named_set(f"{tmp_path}/c.csv=Find alike", "classification")
    evaluation.score_labelled(embed, evaluation.read_labelled(labelled.path), labelled, ["knn"])
    texts = [["x"], ["y"], ["c"], ["a", "b"]]
    assert embed.calls == [(part, "query", "Find alike") for part in texts]


def write_sets(folder: Path) -> tuple[Path, Path]:
    sts = folder / "sts.jsonl"
    pairs = [("a cat", "a cat", 5), ("a cat", "the cat", 4), ("a cat", "stock prices fell", 0)]
    rows = [{"first": a, "second": b, "score": s} for a, b, s in pairs]
    sts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = folder / "labelled.csv"
    lines = [f"{word} {i},{word},{'test' if i < 2 else 'train'}" for word in "ab" for i in range(6)]
    labelled.write_text("text,category,split\n" + "\n".join(lines))
    return sts, labelled


def test_evaluate_command(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sts, labelled = write_sets(tmp_path)
    model = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--threads", "1"]
    sets = ["--sts", str(sts), "--sts", f"{sts}=Find alike", "--classification", str(labelled)]
    assert cli.main(["evaluate", *model, *sets, "--clustering", str(labelled)]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    # The same text twice is nearest whatever the model; three pairs have few possible orders.
    assert scores[str(sts)]["spearman"] >= 0.5
    assert scores[f"{sts}=Find alike"]["spearman"] >= 0.5
    assert scores[str(labelled)].keys() == {"knn_accuracy", "logistic_accuracy", "v_measure"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate"),
        (["--bm25"], "--bm25 is a baseline of retrieval"),
        (["--bm25", "--sts", "x"], "--bm25 scores --retrieval alone"),
        (["--sts", "absent.csv"], "there is no absent.csv"),
        (["--sts", "absent.csv=oops"], "there is no task 'oops'"),
    ],
)
def test_wrong_calls_say_what_is_wrong(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sts", "sts.jsonl", "--sts", "bad.jsonl"], "bad.jsonl, line 1: first is missing"),
        (["--sts", "sts.jsonl", "--retrieval", "empty"], "corpus.jsonl cannot be read"),
        (["--classification", "one.csv"], "fewer than two labels"),
        (["--sts", "sts.jsonl", "--projection", "bad.jsonl"], "bad.jsonl"),
        (["--sts", "sts.jsonl", "--items", "sts.jsonl"], "sts.jsonl is sts.jsonl, which is read"),
        (["--sts", "sts.jsonl", "--items", "hard"], "hard is sts.jsonl, which is read"),
        (["--sts", "sts.jsonl", "--report", "hard"], "hard is sts.jsonl, which is read"),
        (["--sts", "sts.jsonl", "--items", "a", "--report", "a"], "name the same file"),
        (["--retrieval", "set", "--items", "set/corpus.jsonl"], "which is read"),
        (["--sts", "sts.jsonl", "--items", "empty"], "empty is a folder"),
        (["--sts", "sts.jsonl", "--items", "fifo"], "fifo is a pipe (FIFO)"),
        (["--sts", "sts.jsonl", "--items", "conf.yaml", "--config", "conf.yaml"], "which is read"),
    ],
)
def test_files_are_looked_at_before_a_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def load(_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(commands, "embedder", load)
    monkeypatch.chdir(tmp_path)
    write_sets(tmp_path)
    Path("bad.jsonl").write_text('{"second": "b", "score": 1}\n')
    Path("one.csv").write_text("text,label,split\na,x,train\nb,x,test\n")
    Path("conf.yaml").write_text("threads: 1\n")
    Path("empty").mkdir()
    Path("set").mkdir()
    Path("set/corpus.jsonl").write_text('{"id": "a", "text": "a cat"}\n')
    Path("hard").hardlink_to("sts.jsonl")
    os.mkfifo("fifo")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert cli.main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sts.csv", "", "is empty"),
        ("sts.csv", "a\tb\n", "line 1: 2 columns, the sentences are in 6 and 7"),
        (
            "s.jsonl",
            '{"first": "a", "second": "b", "score": 1, "scor": 2}',
            "'scor'; did you mean",
        ),
        ("s.jsonl", '{"first": "a", "second": "b"}', "line 1: score is None, not a number"),
        ("s.jsonl", '{"first": "a", "second": "b", "score": NaN}', "score is nan, not a number"),
        ("s.jsonl", '{"first": "a", "second": 5, "score": 1}', "line 1: second is not a text"),
        ("sts.csv", "a\tb\tc\td\tinf\tx\ty\n", "line 1: score is 'inf', not a number"),
        (
            "c.csv",
            "text,label,splt\na,x,test\n",
            "line 1: unknown column 'splt'",
        ),
        ("c.csv", "text,label,split\na,x,dev\n", "line 2: split is 'dev', not train or test"),
        ("c.csv", "text,label\na,x,y\n", "line 2: more fields than columns"),
        ("c.csv", "txt,label\na,x\n", "unknown column 'txt'; did you mean text?"),
        ("sts.csv", None, "cannot be read: No such file"),
        ("c.csv", None, "cannot be read: No such file"),
        ("c.csv", "text,label\na,x\n,y\n", "line 3: no text"),
        ("c.csv", "text,label,split\na,x,train\n", "no test rows"),
        ("c.csv", "text,label,split\na,x,train\nb,x,test\n", "fewer than two labels"),
        ("corpus.jsonl", None, "corpus.jsonl cannot be read"),
        ("x.ALL", ".I 1\n.W\na\n", "x.REL cannot be read"),
    ],
)
def test_unusable_sets_are_named(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    readers = {
        "sts.csv": lambda: evaluation.read_sts(path),
        "s.jsonl": lambda: evaluation.read_sts(path),
        "c.csv": lambda: evaluation.read_labelled(path, ["knn"]),
    }
    with pytest.raises(DataError, match=message) as error:
        readers.get(name, lambda: evaluation.read_retrieval(tmp_path))()
    assert str(tmp_path) in str(error.value)


def test_an_unusable_sts_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "sts.csv"
    file.write_text("a\tb\tc\td\t5.0\tx\ty\na\tb\tc\td\n")
    with pytest.raises(DataError, match=r"sts\.csv, line 2"):
        evaluation.read_sts(file)
