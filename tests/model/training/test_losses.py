"""The losses against their formulas, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.training.losses import (
    contrastive_loss,
    distillation_loss,
    nested,
    ranking_loss,
    soft_label_loss,
)


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


@pytest.mark.parametrize("in_batch", [False, True])
def test_other_examples_matter_with_in_batch_negatives_only(in_batch: bool) -> None:
    """By the gradient: whether the first query is pushed away from the second's positive."""
    queries = QUERIES[:2].clone().requires_grad_()
    contrastive_loss(
        queries, POSITIVES[:2], NEGATIVES[:3], OWNERS[:3], temperature=0.1, in_batch=in_batch
    ).backward()
    changed = POSITIVES[:2].clone()
    changed[1] = unit(8, seed=9)
    again = QUERIES[:2].clone().requires_grad_()
    contrastive_loss(
        again, changed, NEGATIVES[:3], OWNERS[:3], temperature=0.1, in_batch=in_batch
    ).backward()
    assert queries.grad is not None
    assert again.grad is not None
    assert torch.equal(queries.grad[0], again.grad[0]) is not in_batch
    assert not torch.equal(queries.grad[1], again.grad[1])  # its own positive changed


def test_a_negative_that_is_ones_positive_is_hidden() -> None:
    """Another query's hard negative may be the text of this query's positive."""
    negatives = torch.cat([NEGATIVES[:2], POSITIVES[:1]])
    owners = torch.tensor([0, 1, 1])
    hidden = torch.tensor([[False, False, True], [False, False, False]])

    def loss(rows: Tensor, **options: Tensor) -> float:
        return contrastive_loss(
            QUERIES[:1],
            POSITIVES[:1],
            rows,
            owners[: len(rows)],
            temperature=0.1,
            in_batch=True,
            **options,
        ).item()

    without = loss(negatives[:2])
    assert loss(negatives, same_negatives=hidden[:1]) == pytest.approx(without, rel=1e-6)
    assert loss(negatives) > without


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


def test_a_nested_loss_is_the_mean_over_the_widths() -> None:
    """Of the cosine distance, written out; without widths the loss itself."""
    expected = [
        sum(1 - float(F.cosine_similarity(q[:n], p[:n], dim=0)) for q, p in pairs) / len(pairs)
        for n in (8, 4, 2)
        for pairs in [list(zip(QUERIES, POSITIVES, strict=True))]
    ]
    found = nested(distillation_loss, (4, 2), QUERIES, POSITIVES)
    assert found.item() == pytest.approx(sum(expected) / 3, rel=1e-5)
    alone = nested(distillation_loss, (), QUERIES, POSITIVES)
    assert torch.equal(alone, distillation_loss(QUERIES, POSITIVES))


def test_soft_labels_are_the_divergence_from_the_teachers() -> None:
    documents, taught = unit(6, 8, seed=5), (unit(4, 8, seed=6), unit(6, 8, seed=7))
    expected = 0.0
    for query, teacher in zip(QUERIES, taught[0], strict=True):
        wanted, found = (
            [math.exp(float(q @ d) / 0.1) for d in rows]
            for q, rows in ((teacher, taught[1]), (query, documents))
        )
        for w, f in zip(wanted, found, strict=True):
            p = w / sum(wanted)
            expected += p * math.log(p / (f / sum(found)))
    loss = soft_label_loss(QUERIES, documents, *taught, temperature=0.1)
    assert loss.item() == pytest.approx(expected / 4, rel=1e-4)
    assert soft_label_loss(*taught, *taught, temperature=0.1).item() == pytest.approx(0, abs=1e-6)


def test_ranking_loss_is_the_formula() -> None:
    """What people found less alike, and is nearer, costs; equal scores are not compared."""
    first, second, scores = unit(4, 8, seed=6), unit(4, 8, seed=7), torch.tensor([0.0, 5, 2.5, 2.5])
    cosines = (first * second).sum(-1).tolist()
    lower = [(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)]
    wanted = math.log1p(sum(math.exp((cosines[i] - cosines[j]) / 0.1) for i, j in lower))
    found = ranking_loss(first, second, scores, temperature=0.1)
    assert found.item() == pytest.approx(wanted, rel=1e-5)
    assert ranking_loss(first, second, torch.ones(4), temperature=0.1).item() == 0
