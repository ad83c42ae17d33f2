"""What the authors of each family compute, told once more: the side that a family's row is held
against. Each line is from their code or card, and so are the ids; nothing here reads the rows.

Shapes: T tokens of one sequence, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import Encoding
from model.families import Side

_JUDO = "are judo throws allowed in wrestling?"
_ANSWERS = "Given a question, retrieve passages that answer the question"
_SIMILAR, _SUGAR = "Retrieve similar text", "how do plants make sugar?"
_LIMIT, _FERRIES = "Exactly at the limit, not a token more.", "why did the ferries stop in winter"
_LIMIT_IDS = [1, 1529, 19241, 438, 272, 3607, 28725, 459, 264, 6029, 680, 28723]


@dataclass(frozen=True, slots=True)
class KnownIds:
    """A text and its ids, by the authors' tokenizer and code."""

    side: Side
    task: str
    text: str
    ids: list[int]
    left_out: int = 0
    """Leading positions that are not pooled, where the pool takes more than one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorsModel:
    """One family's forward."""

    causal: bool = False
    pooler: Literal["latent", "mean", "last"]
    eos: bool = True
    keeps_eos: bool = False  # of an input that was cut
    vocabulary: bool = True  # whether it is Mistral's in every model of the family
    known: tuple[KnownIds, ...]

    def pooled(self, states: Tensor, encoding: Encoding) -> Tensor:
        """[T, D] of one text -> [D], of length 1. Not for the latent pooler."""
        assert self.pooler != "latent"
        row = states[-1] if self.pooler == "last" else states[encoding.pool_start :].mean(dim=0)
        return F.normalize(row.to(torch.float32), dim=0)


_BARE_PASSAGE = KnownIds("passage", "", _LIMIT, [*_LIMIT_IDS, 2])
_OF_SIDES_ALONE = AuthorsModel(
    pooler="mean",
    eos=False,
    vocabulary=False,
    known=(
        KnownIds(
            "query", "", _FERRIES, [1, 5709, 28747, 2079, 863, 272, 7724, 2040, 2115, 297, 8539]
        ),
        KnownIds("passage", "", _LIMIT, [1, 12280, 28747, *_LIMIT_IDS[1:]]),
    ),
)
AUTHORS_MODELS = {
    "nv-embed": AuthorsModel(
        pooler="latent",
        known=(
            KnownIds(
                "query",
                _ANSWERS,
                _JUDO,
                [
                    1, 560, 1356, 28747, 12628, 264, 2996, 28725, 20132, 1455, 1291, 369, 4372, 272,
                    2996, 13, 3294, 28747, 460, 4612, 28709, 4965, 4670, 297, 17619, 1905, 28804, 2,
                ],
                left_out=18,
            ),
        ),
    ),
    "e5-mistral": AuthorsModel(
        causal=True,
        pooler="last",
        keeps_eos=True,
        known=(
            KnownIds(
                "query",
                _SIMILAR,
                _SUGAR,
                [
                    1, 560, 1356, 28747, 8337, 12891, 3684, 2245, 13, 3294, 28747, 910, 511, 9923,
                    1038, 9984, 28804, 2,
                ],
            ),
            _BARE_PASSAGE,
        ),
    ),
    "gritlm": AuthorsModel(
        pooler="mean",
        eos=False,
        known=(
            KnownIds(
                "query",
                _SIMILAR,
                _SUGAR,
                [
                    1, 523, 28766, 1838, 28766, 28767, 13, 8637, 12891, 3684, 2245, 13, 28789,
                    28766, 18320, 28766, 28767, 13, 5845, 511, 9923, 1038, 9984, 28804,
                ],
                left_out=18,
            ),
            KnownIds(
                "passage",
                "",
                _LIMIT,
                [
                    1, 523, 28766, 18320, 28766, 28767, 13, 966, 19241, 438, 272, 3607, 28725, 459,
                    264, 6029, 680, 28723,
                ],
                left_out=7,
            ),
        ),
    ),
    "bge-en-icl": AuthorsModel(
        causal=True,
        pooler="last",
        keeps_eos=True,
        known=(
            KnownIds(
                "query",
                _SIMILAR,
                _SUGAR,
                [
                    1, 32000, 28705, 8337, 12891, 3684, 2245, 13, 32001, 28705, 910, 511, 9923,
                    1038, 9984, 28804, 13, 32002, 2,
                ],
            ),
            _BARE_PASSAGE,
        ),
    ),
    "bidirectional-mean": _OF_SIDES_ALONE,
    "nemotron-3-embed": _OF_SIDES_ALONE,
}  # fmt: skip
"""By the name of the family."""
