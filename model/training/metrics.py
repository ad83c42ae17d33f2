"""Scores of embeddings: similarity, retrieval, classification, clustering. Pure functions.

Retrieval has trec_eval's measures: gains are the relevance grades, discounts 1 / log2(rank + 1),
the ideal holds every relevant document, and a query without one is left out. Equal scores are
ranked by the documents' order (trec_eval: by their ids, backwards), nearest neighbours likewise:
the same scores always give the same figures. A score over items is a `Figure`, which keeps them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.extras import how_to_install

Floats = NDArray[np.floating]


def ranks(values: Floats) -> NDArray[np.float64]:
    """1-based ranks; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[places]
    return mean


class Figure(float):
    """A score that keeps the items it is made of: one value of each (a query's nDCG, 1 for a right
    label, a pair's cosine), and where the statistic needs it a second (the people's score)."""

    statistic: str
    items: tuple[Floats, ...]

    @classmethod
    def of(cls, statistic: str, *items: Floats) -> Self:
        """statistic: one of STATISTICS; items: as many arrays [N] as it takes."""
        figure = cls(STATISTICS[statistic](*items))
        figure.statistic, figure.items = statistic, items
        return figure


def _mean(values: Floats) -> float:
    return float(values.mean())


def _spearman(first: Floats, second: Floats) -> float:
    if (first == first[0]).all() or (second == second[0]).all():
        return 0.0
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


STATISTICS: dict[str, Callable[..., float]] = {"mean": _mean, "spearman": _spearman}


def spearman(first: Floats, second: Floats) -> Figure:
    """Rank correlation of two lists, -1 to 1; 0 where one of them is constant and ranks nothing."""
    return Figure.of("spearman", first, second)


def cosine_rows(first: Floats, second: Floats) -> Floats:
    """Cosine of each row of `first` [N, D] with the same row of `second`."""
    dot: Floats = (first * second).sum(axis=1)
    return dot / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))  # type: ignore[no-any-return]


def ndcg(gains: Sequence[float], ideal: Sequence[float], k: int) -> float:
    """gains: of the documents in their order; ideal: of all relevant ones, in any order."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    best = np.sort(np.asarray(ideal, dtype=np.float64))[::-1][:k]
    got = np.asarray(gains, dtype=np.float64)[:k]
    return float((got * discounts[: len(got)]).sum() / (best * discounts[: len(best)]).sum())


def retrieval_scores(
    scores: Floats, relevant: Sequence[Mapping[int, float]], k: int = 10
) -> dict[str, Figure]:
    """nDCG@k, MRR@k and recall@100 of scores [queries, documents].

    relevant: for each query its relevant documents (columns) and their grades. A place behind the
    last column is a relevant document that the corpus lacks: in the ideal, and never found.
    """
    found: list[tuple[float, float, float]] = []
    for row, grades in zip(scores, relevant, strict=True):
        grades = {document: grade for document, grade in grades.items() if grade > 0}
        if not grades:
            continue
        order = np.argsort(-row, kind="stable")[: max(k, 100)].tolist()
        gains = [grades.get(document, 0.0) for document in order]
        first = next((i for i, gain in enumerate(gains[:k]) if gain), None)
        found.append(
            (
                ndcg(gains[:k], list(grades.values()), k),
                0.0 if first is None else 1 / (first + 1),
                sum(gain > 0 for gain in gains[:100]) / len(grades),
            )
        )
    assert found, "no query has a relevant document"
    names = (f"ndcg@{k}", f"mrr@{k}", "recall@100")
    columns = np.array(found).T
    return {name: Figure.of("mean", column) for name, column in zip(names, columns, strict=True)}


def knn_accuracy(
    train: Floats, train_labels: Sequence[str], test: Floats, test_labels: Sequence[str], k: int = 5
) -> Figure:
    """Votes of the k nearest by cosine, each weighted by it; rows have length 1. With fewer than k
    training rows, of all of them."""
    names, coded = np.unique(np.asarray(train_labels), return_inverse=True)
    similar = test @ train.T
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    votes = np.zeros((len(test), len(names)))
    rows = np.arange(len(test))[:, None]
    np.add.at(votes, (rows, coded[nearest]), np.take_along_axis(similar, nearest, axis=1))
    return Figure.of("mean", (names[votes.argmax(axis=1)] == np.asarray(test_labels)).astype(float))


def logistic_accuracy(
    train: Floats, train_labels: Sequence[str], test: Floats, test_labels: Sequence[str]
) -> Figure:
    """Accuracy of a logistic regression on the vectors (scikit-learn, 100 iterations as mteb)."""
    linear_model = _sklearn("linear_model")
    regression = linear_model.LogisticRegression(max_iter=100, C=10.0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 100 iterations need not converge
        regression.fit(train, list(train_labels))
    return Figure.of("mean", (regression.predict(test) == np.asarray(test_labels)).astype(float))


def v_measure(vectors: Floats, labels: Sequence[str], seed: int = 0) -> float:
    """V-measure of k-means with as many clusters as there are labels."""
    kmeans = _sklearn("cluster").MiniBatchKMeans(
        len(set(labels)), batch_size=512, n_init=3, random_state=seed
    )
    return float(_sklearn("metrics").v_measure_score(list(labels), kmeans.fit_predict(vectors)))


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise UnsupportedError(
            f"this score needs scikit-learn: {how_to_install('training')}"
        ) from None
