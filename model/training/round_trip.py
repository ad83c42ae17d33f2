"""Whether an example's query leads back to its own positive: what Promptagator calls round-trip
consistency (Dai et al. 2022), with the hard negatives on top. Knows not where examples come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from model.training.embedders import Embedder
from model.training.examples import Example
from model.training.mining import embed_asked, passage_of, query_of

Verdict = Literal["kept", "negative_nearer", "not_in_top"]
_BLOCK = 1024


def verdicts(examples: Sequence[Example], embed: Embedder, top: int) -> Iterator[Verdict]:
    """Of each example: `kept` when its positive scores above its own negatives, and fewer than
    `top` of the other examples' positives score above it. Equal positives are one."""
    passages = list(dict.fromkeys(passage_of(e, e.positive) for e in examples))
    if not passages:
        return
    place = {passage: row for row, passage in enumerate(passages)}
    matrix = embed_asked(passages, embed)
    for start in range(0, len(examples), _BLOCK):
        block = examples[start : start + _BLOCK]
        queries = embed_asked([query_of(e) for e in block], embed)
        hard = [(row, e, text) for row, e in enumerate(block) for text in e.negatives]
        nearest = np.full(len(block), -np.inf, dtype=np.float32)
        if hard:
            owners = np.array([row for row, _, _ in hard])
            vectors = embed_asked([passage_of(e, text) for _, e, text in hard], embed)
            np.maximum.at(nearest, owners, (queries[owners] * vectors).sum(axis=1))
        scores = queries @ matrix.T
        for row, example in enumerate(block):
            own = scores[row, place[passage_of(example, example.positive)]]
            if nearest[row] >= own:
                yield "negative_nearer"
            else:
                yield "kept" if (scores[row] > own).sum() < top else "not_in_top"
