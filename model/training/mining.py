"""Positive-aware hard negatives (paper, section 4.1.1; NV-Retriever): `nv-embed mine`.

For each query the best-scoring passages whose score is below 0.95 × the positive's, by a
teacher. Candidates are the positives of all examples whose passages are asked alike (`symmetric`
ones are queries with their task), each text once. Knows no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.families import Side
from model.training.embedders import Embedder
from model.training.examples import Example

THRESHOLD = 0.95
_BLOCK = 1024
Asked = tuple[str, Side, str]
"""A text, its side and its task, as an Embedder is asked."""


def mine(
    examples: Sequence[Example],
    embed: Embedder,
    *,
    count: int = 7,
    threshold: float = THRESHOLD,
) -> Iterator[Example]:
    """The examples with up to `count` negatives each; their old negatives are replaced.

    An example none of whose candidates is below the threshold keeps an empty list.
    Raises UnsupportedError for a count or threshold that makes no sense.
    """
    if count < 1 or not 0 < threshold <= 1:
        raise UnsupportedError(
            f"{count} negatives below {threshold} x the positive's score: the number must be 1 or "
            "more, the threshold above 0 and at most 1"
        )
    return _mine(examples, embed, count, threshold)


def _mine(
    examples: Sequence[Example], embed: Embedder, count: int, threshold: float
) -> Iterator[Example]:
    never: dict[str, set[str]] = {}  # a query's own positives, and itself
    for example in examples:
        never.setdefault(example.query, {example.query}).add(example.positive)
    pools = {
        asked: _Pool.of([examples[row].positive for row in rows], asked, embed)
        for asked, rows in _by_passages(examples).items()
    }
    for start in range(0, len(examples), _BLOCK):
        block = examples[start : start + _BLOCK]
        queries = embed_asked([query_of(example) for example in block], embed)
        mined: dict[int, Example] = {}
        for asked, rows in _by_passages(block).items():
            pool = pools[asked]
            for row, scores in zip(rows, queries[rows] @ pool.matrix.T, strict=True):
                example = block[row]
                most = below(scores[pool.place[example.positive]], threshold)
                known = [pool.place[text] for text in never[example.query] if text in pool.place]
                scores[known] = -np.inf
                chosen = tuple(pool.passages[i] for i in hard_negatives(scores, most, count))
                mined[row] = replace(example, negatives=chosen)
        yield from (mined[row] for row in range(len(block)))


@dataclass(frozen=True, slots=True)
class _Pool:
    """Candidates that are asked alike."""

    passages: list[str]
    place: dict[str, int]
    matrix: NDArray[np.float32]  # [N, W]

    @classmethod
    def of(cls, texts: Sequence[str], asked: tuple[Side, str], embed: Embedder) -> _Pool:
        passages = list(dict.fromkeys(texts))
        place = {passage: row for row, passage in enumerate(passages)}
        return cls(passages, place, embed(passages, *asked))


def _by_passages(examples: Sequence[Example]) -> dict[tuple[Side, str], list[int]]:
    """How their passages are asked -> the rows of those examples."""
    groups: dict[tuple[Side, str], list[int]] = {}
    for row, example in enumerate(examples):
        groups.setdefault(example.passage_asked, []).append(row)
    return groups


def query_of(example: Example) -> Asked:
    return example.query, "query", example.task


def passage_of(example: Example, text: str) -> Asked:
    """Its positive, or a negative, as it is asked in training."""
    return text, *example.passage_asked


def embed_asked(asked: Sequence[Asked], embed: Embedder) -> NDArray[np.float32]:
    """The vectors [N, W] of one text or more, in order."""
    groups: dict[tuple[Side, str], list[int]] = {}
    for index, (_, side, task) in enumerate(asked):
        groups.setdefault((side, task), []).append(index)
    parts = [
        (rows, embed([asked[row][0] for row in rows], side, task))
        for (side, task), rows in groups.items()
    ]
    vectors = np.empty((len(asked), parts[0][1].shape[1]), dtype=np.float32)
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
