"""BM25 (Robertson; k1 = 0.9, b = 0.4 as in Anserini), the lexical baseline of retrieval.

Words are lower-cased runs of letters and digits, Lucene's English stop words left out, the rest cut
by Porter's stemmer. Knows nothing of embeddings.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.extras import how_to_install

_WORD = re.compile(r"[a-z0-9]+")
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can do does for from has have how if in into is it no not of "
        "on or such that the their then there these they this to was what which will with",
    )
)


def words(text: str) -> list[str]:
    found = (word for word in _WORD.findall(text.lower()) if word not in _STOP_WORDS)
    return _stemmer().stemWords(list(found))  # type: ignore[no-any-return]


@functools.cache
def _stemmer() -> Any:
    try:
        return importlib.import_module("snowballstemmer").stemmer("porter")
    except ImportError:
        raise UnsupportedError(
            f"BM25 needs snowballstemmer: {how_to_install('training')}"
        ) from None


class BM25:
    def __init__(self, documents: Sequence[str], *, k1: float = 0.9, b: float = 0.4) -> None:
        counts = [Counter(words(document)) for document in documents]
        lengths = np.array([sum(count.values()) for count in counts], dtype=np.float64)
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        postings: dict[str, list[tuple[int, int]]] = {}
        for document, count in enumerate(counts):
            for word, times in count.items():
                postings.setdefault(word, []).append((document, times))
        self._size = len(documents)
        self._weights: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for word, entries in postings.items():
            places = np.array([place for place, _ in entries])
            tf = np.array([count for _, count in entries], dtype=np.float64)
            idf = math.log(1 + (self._size - len(places) + 0.5) / (len(places) + 0.5))
            self._weights[word] = places, idf * tf * (k1 + 1) / (tf + norm[places])

    def scores(self, queries: Sequence[str]) -> NDArray[np.float64]:
        """-> [queries, documents]."""
        result = np.zeros((len(queries), self._size))
        for row, query in zip(result, queries, strict=True):
            for word in words(query):
                if word in self._weights:
                    rows, weights = self._weights[word]
                    row[rows] += weights
        return result
