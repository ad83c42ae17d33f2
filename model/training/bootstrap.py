"""How sure a score is, and a difference of two: percentile bootstrap over its items.

The items of a set (queries, pairs, texts) are drawn anew with replacement, as many as there are;
of two models the same items each time, so that what is hard for both does not count (paired).
The same numbers are drawn for the same number of items: an interval can be repeated. Knows no
models; files of items are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.training.examples import DataError, read_text
from model.training.metrics import STATISTICS, Figure
from model.user_files import mode_like, replacing

RESAMPLES = 2000
LEVEL = 0.95
_SEED = 20240527

ALL_QUERIES = "all queries"
"""The name under which several retrieval sets are reported together."""

Interval = tuple[float, float]
Scores = Mapping[str, Mapping[str, float]]
"""set -> metric -> score; those that are a Figure have an interval"""


def interval(figure: Figure) -> Interval:
    """In which the figure lies at LEVEL."""
    return _percentiles(_resampled(figure))


def difference(figure: Figure, other: Figure) -> Interval:
    """In which figure - other lies at LEVEL; both of the same items in the same order."""
    assert figure.statistic == other.statistic, (figure.statistic, other.statistic)
    assert len(figure.items[0]) == len(other.items[0])
    return _percentiles(_resampled(figure) - _resampled(other))


def _resampled(figure: Figure) -> NDArray[np.float64]:
    """The figure of each of RESAMPLES draws."""
    rng = np.random.default_rng(_SEED)
    statistic, count = STATISTICS[figure.statistic], len(figure.items[0])
    draws = (rng.integers(0, count, count) for _ in range(RESAMPLES))
    return np.array([statistic(*(item[rows] for item in figure.items)) for rows in draws])


def _percentiles(values: NDArray[np.float64]) -> Interval:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def figures_of(scores: Scores) -> Iterator[tuple[str, str, Figure]]:
    """(set, metric, figure) of those scores that are one."""
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            if isinstance(value, Figure):
                yield name, metric, value


def write_items(path: Path, scores: Scores, digests: Mapping[str, str]) -> None:
    """Keep the items of all figures for a later comparison; digests: of each set's files."""
    kept = [
        {
            "set": name,
            "sha256": digests[name],
            "metric": metric,
            "statistic": figure.statistic,
            "items": [[round(float(x), 6) for x in item] for item in figure.items],
        }
        for name, metric, figure in figures_of(scores)
        if name in digests
    ]
    with replacing(path, mode_like(None)) as file:
        json.dump(kept, file)
        file.write("\n")


def all_queries(scores: Scores, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The retrieval measures over the queries of the named sets together; nothing where one of
    them is absent."""
    if any(name not in scores for name in names):
        return {}
    columns = {metric: [scores[name][metric] for name in names] for metric in scores[names[0]]}
    figures = {
        metric: [figure for figure in column if isinstance(figure, Figure)]
        for metric, column in columns.items()
    }
    return {
        ALL_QUERIES: {
            metric: Figure.of("mean", np.concatenate([figure.items[0] for figure in column]))
            for metric, column in figures.items()
        }
    }


@dataclass(frozen=True, slots=True)
class Judged:
    """A score, how sure it is, and how sure its difference to another run's, where there is one."""

    name: str
    metric: str
    score: float
    interval: Interval | None
    difference: float | None = None
    difference_interval: Interval | None = None

    def __str__(self) -> str:
        text = f"{self.name:32} {self.metric:20} {self.score:.4f}"
        if self.interval:
            text += " [{:.4f}, {:.4f}]".format(*self.interval)
        if self.difference_interval:
            text += f"  {self.difference:+.4f} "
            text += "[{:+.4f}, {:+.4f}]".format(*self.difference_interval)
        return text


def judge(scores: Scores, others: Scores) -> Iterator[Judged]:
    """Every score; others: the figures of another run on the same items."""
    for name, metrics in scores.items():
        for metric, score in metrics.items():
            if not isinstance(score, Figure):
                yield Judged(name, metric, score, None)
                continue
            other = others.get(name, {}).get(metric)
            if not isinstance(other, Figure):
                yield Judged(name, metric, score, interval(score))
                continue
            between = difference(score, other)
            yield Judged(name, metric, score, interval(score), score - other, between)


def as_json(judged: Iterable[Judged]) -> dict[str, Any]:
    """intervals and, where there are some, differences: set -> metric -> numbers."""
    intervals: dict[str, dict[str, Interval]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for row in judged:
        if row.interval:
            intervals.setdefault(row.name, {})[row.metric] = row.interval
        if row.difference_interval:
            found = {"difference": row.difference, "interval": row.difference_interval}
            differences.setdefault(row.name, {})[row.metric] = found
    return {"intervals": intervals} | ({"differences": differences} if differences else {})


class Other:
    """The figures of another run, from a file of `write_items`. Raises DataError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[tuple[str, str, str], Figure] = {}
        try:
            for row in json.loads(read_text(path)):
                items = [np.array(item, dtype=np.float64) for item in row["items"]]
                key = row["sha256"], row["metric"], row["set"]
                self._figures[key] = Figure.of(row["statistic"], *items)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no file of --items: {error!r}") from None

    def matching(self, scores: Scores, digests: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Its figures of the same sets by their contents, first those of the same name: there may
        be two, of two tasks. Raises DataError when there is none."""
        found: dict[str, dict[str, float]] = {}
        for name, metric, figure in figures_of(scores):
            candidates = {
                other: value
                for (digest, its_metric, other), value in self._figures.items()
                if (digest, its_metric) == (digests.get(name), metric)
                and len(value.items[0]) == len(figure.items[0])
            }
            if candidates:
                value = candidates.get(name, next(iter(candidates.values())))
                found.setdefault(name, {})[metric] = value
        if not found:
            raise DataError(f"{self._path} holds none of these sets")
        return found
