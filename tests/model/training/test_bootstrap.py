"""Intervals against scipy's bootstrap, an independent one, and the options of `evaluate`."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.training import bootstrap
from model.training.bm25 import BM25
from model.training.metrics import Figure, spearman
from server import cli

RNG = np.random.default_rng(7)
SKILL = RNG.beta(2, 2, 400)  # how easy a query is, for both models
ONE = np.clip(SKILL + RNG.normal(0, 0.05, 400), 0, 1)
TWO = np.clip(SKILL + 0.02 + RNG.normal(0, 0.05, 400), 0, 1)


def scipys(data: tuple[Any, ...], statistic: Any) -> tuple[float, float]:
    from scipy import stats

    found = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    return float(found.low), float(found.high)


def test_the_interval_of_a_mean_is_scipys() -> None:
    found = bootstrap.interval(Figure.of("mean", ONE))
    assert found == pytest.approx(scipys((ONE,), np.mean), abs=0.003)
    assert found[0] < ONE.mean() < found[1]


def test_the_interval_of_a_rank_correlation_is_scipys() -> None:
    from scipy import stats

    expected = scipys((ONE, TWO), lambda a, b: stats.spearmanr(a, b).statistic)
    assert bootstrap.interval(spearman(ONE, TWO)) == pytest.approx(expected, abs=0.006)


def test_a_difference_is_paired() -> None:
    """What is hard for both models does not count: the unpaired interval would hold 0."""
    found = bootstrap.difference(Figure.of("mean", TWO), Figure.of("mean", ONE))
    expected = scipys((TWO, ONE), lambda a, b: np.mean(a) - np.mean(b))
    assert found == pytest.approx(expected, abs=0.002)
    assert found[0] > 0
    apart = np.subtract(*(bootstrap.interval(Figure.of("mean", x)) for x in (TWO, ONE)))
    assert found[1] - found[0] < 0.3 * (apart[1] - apart[0] + 0.1)
    itself = bootstrap.difference(Figure.of("mean", ONE), Figure.of("mean", ONE))
    assert itself == (0, 0)


def test_several_sets_are_weighed_by_their_queries() -> None:
    first, second = Figure.of("mean", np.ones(30)), Figure.of("mean", np.zeros(10))
    scores = {"a": {"ndcg@10": first}, "b": {"ndcg@10": second}, "c": {"v_measure": 0.5}}
    assert bootstrap.all_queries(scores, ["a", "b"]) == {"all queries": {"ndcg@10": 0.75}}
    assert bootstrap.all_queries(scores, ["a", "absent"]) == {}


DOCUMENTS = ["the red cat sat", "a green dog ran", "blue fish swim", "the sun shines", "moon rises"]


def write_retrieval(folder: Path, queries: list[str]) -> Path:
    folder.mkdir()
    for name, texts in (("corpus", DOCUMENTS), ("queries", queries)):
        rows = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    (folder / "qrels.tsv").write_text("".join(f"{i}\t{i}\t1\n" for i in range(len(queries))))
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli.main(["evaluate", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])  # type: ignore[no-any-return]


def test_evaluate_compares_two_runs(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = str(write_retrieval(tmp_path / "one", ["red cat", "green dog", "swimming fish"]))
    two = str(write_retrieval(tmp_path / "two", ["the sun", "a dog"]))
    items, sets = str(tmp_path / "bm25.json"), ["--retrieval", one, "--retrieval", two]
    bm25 = evaluate(capsys, "--bm25", *sets, "--items", items)
    low, high = bm25["intervals"][two]["ndcg@10"]
    assert low <= bm25["scores"][two]["ndcg@10"] <= high
    assert "differences" not in bm25
    model = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--threads", "1"]
    page = tmp_path / "report.html"
    found = evaluate(capsys, *model, *sets, "--against", items, "--report", str(page))
    shown = page.read_text()
    for metric, score in found["scores"][one].items():
        assert f"<tr><td>{one}</td><td>{metric}</td><td>{score:.4g}</td>" in shown
        assert f"<h2>{metric}: differences</h2>" in shown
    (raw,) = re.findall(r"<pre>(.*?)</pre>", shown)
    assert json.loads(unescape(raw)) == found
    for name in (one, two, "all queries"):
        difference = found["scores"][name]["ndcg@10"] - bm25["scores"][name]["ndcg@10"]
        row = found["differences"][name]["ndcg@10"]
        assert row["difference"] == pytest.approx(difference, abs=1e-5)
        assert row["interval"][0] <= difference + 1e-5
    # The same set elsewhere is the same set; one that has changed is another.
    again = str(write_retrieval(tmp_path / "again", ["the sun", "a dog"]))
    assert evaluate(capsys, *model, "--retrieval", again, "--against", items)["differences"]
    changed = str(write_retrieval(tmp_path / "changed", ["the sun", "a cat"]))
    call = ["evaluate", *model, "--retrieval", changed, "--against", items]
    assert cli.main(call) == 2
    assert "bm25.json holds none of these sets" in capsys.readouterr().err


def test_a_file_that_holds_no_items_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write_retrieval(tmp_path / "set", ["red cat"]))
    for content in ("{}", "[1]", "nothing", '[{"set": "a"}]'):
        (tmp_path / "items.json").write_text(content)
        call = ["--bm25", "--retrieval", folder, "--against", str(tmp_path / "items.json")]
        assert cli.main(["evaluate", *call]) == 2
        message = capsys.readouterr().err
        assert "items.json" in message


def test_queries_in_another_case(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = str(write_retrieval(tmp_path / "small", ["red cat", "green dog"]))
    large = str(write_retrieval(tmp_path / "large", ["RED CAT", "GREEN DOG"]))
    model = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--threads", "1"]
    items = str(tmp_path / "items.json")
    shouted = evaluate(capsys, *model, "--retrieval", small, "--case", "upper", "--items", items)
    expected = evaluate(capsys, *model, "--retrieval", large)
    assert shouted["scores"][small] == expected["scores"][large]


def test_vectors_are_projected_and_cut(
    tiny_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from model.encoder import Encoder
    from model.training import evaluation
    from model.training.teacher import Projection

    folder = write_retrieval(tmp_path / "set", ["red cat", "green dog", "swimming fish"])
    matrix = np.random.default_rng(2).normal(size=(32, 8)).astype(np.float32)
    Projection(matrix).save(tmp_path / "p.safetensors")
    model = ["--model", str(tiny_checkpoint), "--dtype", "float32", "--threads", "1"]
    cut = ["--projection", str(tmp_path / "p.safetensors"), "--dimensions", "3"]
    found = evaluate(capsys, *model, "--retrieval", str(folder), "--no-instructions", *cut)
    data = evaluation.read_retrieval(folder)
    encoder = Encoder(str(tiny_checkpoint), dtype="float32", threads=1)
    q, d = (encoder.encode(texts, "") @ matrix[:, :3] for texts in (data.queries, data.documents))
    scores = (q @ d.T) / np.linalg.norm(d, axis=1)
    ranks = (scores > np.take_along_axis(scores, np.arange(3)[:, None], axis=1)).sum(axis=1) + 1
    assert found["scores"][str(folder)]["mrr@10"] == pytest.approx(np.mean(1 / ranks))
    call = ["evaluate", *model, "--retrieval", str(folder), "--dimensions", "33"]
    assert cli.main(call) == 2
    assert "--dimensions 33: the vectors have 32" in capsys.readouterr().err


def test_bm25_is_not_changed_by_the_case() -> None:
    assert (BM25(DOCUMENTS).scores(["RED CAT"]) == BM25(DOCUMENTS).scores(["red cat"])).all()
