"""The losses against their formulas, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.losses import contrastive_loss, distillation_loss


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


QUERIES, POSITIVES, NEGATIVES = unit(4, 8, seed=1), unit(4, 8, seed=2), unit(5, 8, seed=3)
OWNERS = torch.tensor([0, 0, 1, 3, 3])  # query 2 has none of its own


def naive(*, in_batch: bool, same: set[tuple[int, int]], temperature: float = 0.1) -> float:
    losses = []
    for i, query in enumerate(QUERIES):
        rivals = [
            n for n, owner in zip(NEGATIVES, OWNERS.tolist(), strict=True) if in_batch or owner == i
        ]
        if in_batch:
            rivals += [p for j, p in enumerate(POSITIVES) if j != i and (i, j) not in same]
        own = math.exp(float(query @ POSITIVES[i]) / temperature)
        others = sum(math.exp(float(query @ rival) / temperature) for rival in rivals)
        losses.append(-math.log(own / (own + others)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("same", [set(), {(0, 2), (2, 0)}])
def test_contrastive_loss_is_the_formula(in_batch: bool, same: set[tuple[int, int]]) -> None:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    for i, j in same:
        mask[i, j] = True
    found = contrastive_loss(
        QUERIES, POSITIVES, NEGATIVES, OWNERS, temperature=0.1, in_batch=in_batch, same=mask
    )
    assert found.item() == pytest.approx(naive(in_batch=in_batch, same=same), rel=1e-5)


def test_without_in_batch_negatives_other_examples_do_not_matter() -> None:
    def loss(positives: Tensor, negatives: Tensor) -> float:
        return contrastive_loss(
            QUERIES[:2], positives, negatives, OWNERS[:3], temperature=0.1, in_batch=False
        ).item()

    def of_first(positives: Tensor, negatives: Tensor) -> float:
        alone = contrastive_loss(
            QUERIES[:1], positives[:1], negatives[:2], OWNERS[:2], temperature=0.1, in_batch=False
        )
        return alone.item()

    changed = POSITIVES[:2].clone()
    changed[1] = unit(8, seed=9)
    before, after = loss(POSITIVES[:2], NEGATIVES[:3]), loss(changed, NEGATIVES[:3])
    assert before != after  # the second query's own loss
    assert of_first(POSITIVES, NEGATIVES) == of_first(changed, NEGATIVES)


def test_no_hard_negatives_at_all() -> None:
    nothing = torch.empty(0, 8)
    owners = torch.empty(0, dtype=torch.long)
    alone = contrastive_loss(QUERIES, POSITIVES, nothing, owners, temperature=0.1, in_batch=False)
    assert alone.item() == 0
    together = contrastive_loss(QUERIES, POSITIVES, nothing, owners, temperature=0.1, in_batch=True)
    assert together.item() > 0


def test_distillation_loss_is_the_cosine_distance() -> None:
    expected = sum(1 - float(a @ b) for a, b in zip(QUERIES, POSITIVES, strict=True)) / 4
    assert distillation_loss(QUERIES, POSITIVES).item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(QUERIES, QUERIES).item() == pytest.approx(0, abs=1e-6)
