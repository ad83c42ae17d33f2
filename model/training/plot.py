"""Losses and validation scores of a run, from its metrics.jsonl, as PNG and SVG."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np

from model.errors import UnsupportedError

_LOSSES = ("loss", "contrastive", "distillation")
_WINDOW = 25
"""Steps of the running mean that is drawn over the losses."""


def plot(run: Path) -> list[Path]:
    """Draw run/metrics.png and .svg; returns them. Raises UnsupportedError without matplotlib."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise UnsupportedError(
            "a plot needs matplotlib: pip install 'nv-embed-server[training]'"
        ) from None
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
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
    figure.tight_layout()
    paths = [run / "metrics.png", run / "metrics.svg"]
    for path in paths:
        figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return paths


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of each value and up to _WINDOW - 1 before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - _WINDOW)
    means: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return means
