"""Positive-aware hard negatives (paper, section 4.1.1; NV-Retriever): `nv-embed mine`.

For each query the best-scoring passages whose score is below 0.95 × the positive's, by a
teacher. Candidates are the positives of all examples, each text once. Knows no training.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.training.examples import Example

THRESHOLD = 0.95
_BLOCK = 1024
_TIMEOUT_S = 600

Embed = Callable[[Sequence[str], str], NDArray[np.float32]]
"""texts, instruction -> [N, W], of length 1; a teacher that knows no instructions ignores them"""


def mine(
    examples: Sequence[Example],
    embed: Embed,
    *,
    count: int = 7,
    threshold: float = THRESHOLD,
) -> Iterator[Example]:
    """The examples with up to `count` negatives each; their old negatives are replaced.

    An example none of whose candidates is below the threshold keeps an empty list.
    """
    passages = list(dict.fromkeys(example.positive for example in examples))
    place = {passage: row for row, passage in enumerate(passages)}
    never: dict[str, list[int]] = {}  # a query's own positives, and itself
    for example in examples:
        never.setdefault(example.query, []).append(place[example.positive])
    for query, rows in never.items():
        rows += [place[query]] if query in place else []
    matrix = embed(passages, "")
    for start in range(0, len(examples), _BLOCK):
        block = examples[start : start + _BLOCK]
        scores = _embed_queries(block, embed) @ matrix.T
        for example, row in zip(block, scores, strict=True):
            most = below(row[place[example.positive]], threshold)
            row[never[example.query]] = -np.inf
            chosen = hard_negatives(row, most, count)
            yield replace(example, negatives=tuple(passages[i] for i in chosen))


def _embed_queries(examples: Sequence[Example], embed: Embed) -> NDArray[np.float32]:
    """Each query with its own instruction, in order."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.query_instruction, []).append(index)
    parts = [
        (rows, embed([examples[row].query for row in rows], instruction))
        for instruction, rows in groups.items()
    ]
    vectors = np.empty((len(examples), parts[0][1].shape[1]), dtype=np.float32)
    for rows, part in parts:
        vectors[rows] = part
    return vectors


def below(score: float, threshold: float) -> float:
    """What a negative must stay under: 0.95 × the positive's score; below it for negative ones."""
    return score - (1 - threshold) * abs(score)


def hard_negatives(scores: NDArray[np.floating], most: float, count: int) -> list[int]:
    """Places of the `count` best scores below `most`, best first."""
    allowed = np.where(scores < most, scores, -np.inf)
    top = np.argpartition(-allowed, min(count, len(allowed) - 1))[:count]
    top = top[np.argsort(-allowed[top], kind="stable")]
    return [int(i) for i in top if allowed[i] > -np.inf]


class ServerEmbedder:
    """Vectors from a running server that speaks OpenAI's embeddings API."""

    def __init__(self, url: str, model: str | None = None, api_key: str = "none") -> None:
        self.url, self.api_key = url.rstrip("/"), api_key
        self.model = model or self._first_model()

    def __call__(self, texts: Sequence[str], instruction: str = "") -> NDArray[np.float32]:
        """instruction: verbatim prefix, sent as `prompt`."""
        rows: list[list[float]] = []
        for start in range(0, len(texts), 256):
            body: dict[str, Any] = {
                "model": self.model,
                "input": list(texts[start : start + 256]),
                "prompt": instruction,
            }
            found = self._call("/v1/embeddings", body)["data"]
            rows += [item["embedding"] for item in sorted(found, key=lambda item: item["index"])]
        return np.array(rows, dtype=np.float32)

    def _first_model(self) -> str:
        return str(self._call("/v1/models", None)["data"][0]["id"])

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        if not self.url.startswith(("http://", "https://")):
            raise UnsupportedError(f"{self.url} is not an http address")
        request = urllib.request.Request(  # noqa: S310
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.api_key}"},
        )
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:  # noqa: S310
            return json.loads(response.read())  # type: ignore[no-any-return]
