"""Compare recipes: the same budget for each, several seeds, mean and spread of the scores.

    python -m model.training.ablation recipes/ablation-pooling.json -o OUT --sts FILE …

The file holds `base` (settings as of `nv-embed train`), `seeds`, and `cells`: a name and its runs,
one after the other, each a change of the base. A run starts from the weights of the one before it.
OUT gets each run's folder, scores.json, table.md and a plot. A second call goes on where the first
stopped. Trains through `trainer`, scores through `evaluation`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from model import console
from model.training import evaluation
from model.training.evaluation import NamedSet
from model.training.plot import plot_cells
from model.training.settings import TrainingSettings
from model.training.trainer import Trainer

Scores = dict[str, dict[str, float]]
"""set -> metric -> score"""


@dataclass(frozen=True, slots=True)
class Sets:
    """What the outcome is scored on."""

    sts: tuple[NamedSet, ...] = ()
    retrieval: tuple[NamedSet, ...] = ()
    classification: tuple[NamedSet, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """One cell with one seed."""

    cell: str
    seed: int
    runs: tuple[TrainingSettings, ...]
    folder: Path

    def scores(self) -> Scores | None:
        """What was scored before, if it was."""
        path = self.folder / "scores.json"
        return json.loads(path.read_text()) if path.exists() else None


def trials(file: Path, out: Path, base: Path | None = None) -> Iterator[Trial]:
    """All cells and seeds of a file. Raises TrainingSettingsError."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    for cell, changes in raw["cells"].items():
        for seed in raw["seeds"]:
            folder = out / f"{cell.replace(' ', '-').replace(',', '')}-{seed}"
            runs: list[TrainingSettings] = []
            for number, change in enumerate(changes):
                settings = TrainingSettings.of(
                    raw["base"] | change | {"seed": seed}, file, base or file.parent
                )
                if number:
                    start = str(folder / f"run-{number - 1}" / "checkpoint")
                    settings = dataclasses.replace(settings, model=start)
                runs.append(settings)
            yield Trial(cell, seed, tuple(runs), folder)


def run(trial: Trial, sets: Sets) -> Scores:
    """Train and score one trial, unless that was done before."""
    if (known := trial.scores()) is not None:
        return known
    for number, settings in enumerate(trial.runs):
        trainer = Trainer(settings, trial.folder / f"run-{number}")
        trainer.run(progress=False)
    scores: Scores = {}
    for named in sets.sts:
        scores[named.path.name] = dict(
            evaluation.score_sts(trainer.embed_texts, evaluation.read_sts(named.path), named)
        )
    for named in sets.retrieval:
        data = evaluation.read_retrieval(named.path)
        found = evaluation.score_retrieval(trainer.embed_texts, data, named)
        scores[named.path.name] = dict(found)
    for named in sets.classification:
        labelled = evaluation.read_labelled(named.path, ("knn",))
        scores[named.path.name] = evaluation.score_labelled(
            trainer.embed_texts, labelled, named, ("knn",)
        )
    (trial.folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    return scores


def run_all(todo: list[Trial], sets: Sets, jobs: int) -> dict[str, list[Scores]]:
    """cell -> the scores of its seeds; each trial in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(run, trial, sets): trial for trial in todo}
        for future in tqdm(as_completed(futures), "Trials", total=len(futures)):
            future.result()
    found: dict[str, list[Scores]] = {}
    for future, trial in futures.items():
        found.setdefault(trial.cell, []).append(future.result())
    return found


def table(found: dict[str, list[Scores]]) -> str:
    """Markdown: a row for each cell, mean ± sample standard deviation over its seeds."""
    (first, *_), *_ = found.values()
    columns = [(name, metric) for name, metrics in first.items() for metric in metrics]
    lines = ["| | " + " | ".join(f"{name} {metric}" for name, metric in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for cell, seeds in found.items():
        row = []
        for name, metric in columns:
            values = np.array([scores[name][metric] for scores in seeds])
            spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.3f}{spread}")
        lines.append(f"| {cell} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare recipes over several seeds.")
    parser.add_argument("file", type=Path, help="JSON: base, cells, seeds")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="where relative paths of the file start")
    for kind in ("sts", "retrieval", "classification"):
        parser.add_argument(
            f"--{kind}", action="append", default=[], help="PATH[=TASK], as in nv-embed evaluate"
        )
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    arguments = parser.parse_args()
    sets = Sets(
        tuple(evaluation.named_set(text, "sts") for text in arguments.sts),
        tuple(evaluation.named_set(text, "retrieval") for text in arguments.retrieval),
        tuple(evaluation.named_set(text, "classification") for text in arguments.classification),
    )
    todo = list(trials(arguments.file, arguments.out, arguments.base))
    found = run_all(todo, sets, arguments.jobs)
    text = table(found)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print("drawn:", *plot_cells(found, arguments.out))
    print(json.dumps({"cells": found}))


if __name__ == "__main__":
    sys.exit(console.run("ablation", main))
