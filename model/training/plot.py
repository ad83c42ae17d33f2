"""Losses and validation scores of a run, and the scores of an ablation, as PNG and SVG."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UnsupportedError
from model.extras import how_to_install

_LOSSES = ("loss", "contrastive", "distillation")
_WINDOW = 25
"""Steps of the running mean that is drawn over the losses."""


def plot(run: Path) -> list[Path]:
    """Draw run/metrics.png and .svg; returns them. Raises UnsupportedError without matplotlib."""
    pyplot = _pyplot()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 7))
    for name in _LOSSES:
        found = [(line["step"], line[name]) for line in lines if name in line]
        if found:
            steps, values = zip(*found, strict=True)
            top.plot(steps, _smooth(np.array(values)), label=name)
    for name in sorted({key for line in lines for key in line if key.startswith("validation_")}):
        found = [(line["step"], line[name]) for line in lines if name in line]
        bottom.plot(*zip(*found, strict=True), marker="o", label=name.removeprefix("validation_"))
    top.set_ylabel(f"loss (mean of {_WINDOW} steps)")
    bottom.set_ylabel("validation")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend()
    return _save(figure, run / "metrics")


def plot_cells(found: dict[str, list[dict[str, dict[str, float]]]], out: Path) -> list[Path]:
    """Draw out/scores.png and .svg: a panel for each score, a dot for each seed of each cell.

    found: cell -> its seeds' scores (set -> metric -> value), as `ablation` collects them.
    """
    (first, *_), *_ = found.values()
    columns = [(name, metric) for name, metrics in first.items() for metric in metrics]
    figure, panels = _pyplot().subplots(
        1, len(columns), sharey=True, squeeze=False, figsize=(3 * len(columns) + 2, 4)
    )
    for axes, (name, metric) in zip(panels[0], columns, strict=True):
        for row, seeds in enumerate(found.values()):
            values = [scores[name][metric] for scores in seeds]
            axes.plot(values, [row] * len(values), "o", color="C0", alpha=0.6)
            axes.plot([np.mean(values)], [row], "|", color="black", markersize=18)
        axes.set_title(f"{name}\n{metric}", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0][0].set_yticks(range(len(found)), list(found))
    panels[0][0].invert_yaxis()
    return _save(figure, out / "scores")


def _pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise UnsupportedError(f"a plot needs matplotlib: {how_to_install('training')}") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _save(figure: Any, stem: Path) -> list[Path]:
    figure.tight_layout()
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    for path in paths:
        figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return paths


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to _WINDOW - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - _WINDOW)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means
