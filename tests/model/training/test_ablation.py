"""Ablations: every cell with every seed, resumable, mean and spread in one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from model.training import ablation
from model.training.settings import TrainingSettings, TrainingSettingsError

RECIPES = Path(ablation.__file__).parent / "recipes"


@pytest.fixture
def file(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> Path:
    base = {"model": str(tiny_checkpoint), "data": {str(tiny_data / "pairs.jsonl"): 1}}
    base |= {"steps": 3, "pairs_per_step": 4, "dtype": "float32", "threads": 1}
    cells = {
        "EOS, causal": [{"pooling": "eos", "causal": True}],
        "two": [{"stage": 1}, {"stage": 2, "steps": 2}],
    }
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps({"base": base, "cells": cells, "seeds": [1, 2]}))
    return path


@pytest.mark.slow
def test_every_cell_is_scored_with_every_seed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows = [("a cat", "cats", 4.0), ("a red car", "the moon", 0.5), ("tea", "milk tea", 3.0)]
    sts = tmp_path / "sts.jsonl"
    keys = ("first", "second", "score")
    sts.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["ablation", str(file), "-o", str(out), "--sts", str(sts)])
    ablation.main()
    cells = json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]
    assert {cell: len(seeds) for cell, seeds in cells.items()} == {"EOS, causal": 2, "two": 2}
    assert (out / "scores.svg").stat().st_size > 5_000
    second = json.loads((out / "two-1/run-1/settings.json").read_text())
    assert second["model"] == str(out / "two-1/run-0/checkpoint")
    assert second["seed"] == 1

    # A second call trains nothing that is scored already.
    (out / "two-1/scores.json").write_text(json.dumps({"sts.jsonl": {"spearman": 0.25}}))
    ablation.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]["two"][0] == {
        "sts.jsonl": {"spearman": 0.25}
    }


def test_the_table_has_mean_and_spread() -> None:
    found = {"a": [{"set": {"score": x}} for x in (0.1, 0.2, 0.3)], "b": [{"set": {"score": 0.5}}]}
    assert ablation.table(found).splitlines()[2:] == ["| a | 0.200 ± 0.100 |", "| b | 0.500 |"]


@pytest.mark.parametrize(
    "name", ["ablation-pooling", "ablation-stages", "ablation-classes", "ablation-third"]
)
def test_the_recipes_spend_the_same_on_every_cell(name: str, tmp_path: Path) -> None:
    """Texts read, and steps."""
    trials = list(ablation.trials(RECIPES / f"{name}.json", tmp_path))
    assert len(trials) > 1
    budgets = {
        (sum(map(texts_read, trial.runs)), sum(run.steps for run in trial.runs)) for trial in trials
    }
    assert len(budgets) == 1


def texts_read(run: TrainingSettings) -> int:
    pairs = run.pairs_per_step * (2 + run.max_negatives) if run.data else 0
    return run.steps * (pairs + run.texts_per_step + 2 * run.scored_per_step)


def test_an_unknown_setting_is_named(file: Path, tmp_path: Path) -> None:
    raw = json.loads(file.read_text())
    raw["cells"]["two"][1]["pool"] = "mean"
    file.write_text(json.dumps(raw))
    with pytest.raises(TrainingSettingsError, match="unknown pool"):
        list(ablation.trials(file, tmp_path))
