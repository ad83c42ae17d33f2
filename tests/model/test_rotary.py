from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import Rope
from model.operations import InPlace, OnCpu
from model.rotary import HalvesRotary, InPlaceRotary, NeighboursRotary, as_neighbours

HEADS, E, WIDTH, ROWS = 3, 8, 20, 11
ROPE = Rope(E, 10000.0)
POSITIONS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 500, 4000, 1, 2], dtype=torch.int32)


def published(x: Tensor, positions: Tensor) -> Tensor:
    """The formula, number by number, in float64: pair (i, i + E/2) by position / theta^(2i/E)."""
    out = x.double().clone()
    for i in range(E // 2):
        angle = positions.double()[:, None] * 10000.0 ** (-2 * i / E)
        a, b = x[..., i].double(), x[..., i + E // 2].double()
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + E // 2] = b * angle.cos() + a * angle.sin()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_each_way_gives_the_published_scores(dtype: torch.dtype) -> None:
    """Scores of queries with keys, through weights as a checkpoint holds them; on slices of a
    wider product, as the model has them."""
    torch.manual_seed(0)
    x, wq, wk = torch.randn(ROWS, WIDTH), *torch.randn(2, HEADS * E, WIDTH)

    def heads(weight: Tensor) -> Tensor:
        wider = torch.cat([weight, torch.randn(6, WIDTH)])
        return torch.unflatten((x @ wider.T).to(dtype)[:, : HEADS * E], -1, (HEADS, E))

    q, k = (published(heads(w), POSITIONS) for w in (wq, wk))
    expected = torch.einsum("qhe,khe->hqk", q, k)
    for layout in (HalvesRotary, InPlaceRotary, NeighboursRotary):
        rotary = layout.of(POSITIONS, ROPE, dtype)
        if layout is NeighboursRotary:
            wq, wk = as_neighbours(wq, E), as_neighbours(wk, E)
        q, k = (rotary.rotate(heads(w)).double() for w in (wq, wk))
        scores = torch.einsum("qhe,khe->hqk", q, k)
        tolerance = 1e-3 if dtype == torch.float32 else 0.03 * float(expected.abs().max())
        torch.testing.assert_close(scores, expected, atol=tolerance, rtol=0)


@torch.inference_mode()
def test_chosen_rows() -> None:
    rows = torch.tensor([1, 7, 10])
    x = torch.randn(ROWS, HEADS, E)
    for layout in (HalvesRotary, InPlaceRotary, NeighboursRotary):
        rotary = layout.of(POSITIONS, ROPE, torch.float32)
        some = rotary.select(rows).rotate(x[rows].clone())
        torch.testing.assert_close(some, rotary.rotate(x.clone())[rows], atol=0, rtol=0)


def test_which_may_overwrite() -> None:
    """What learns keeps its operands, and a gradient passes."""
    for rotary, kept in ((HalvesRotary, True), (InPlaceRotary, False), (NeighboursRotary, False)):
        x = torch.randn(ROWS, HEADS, E)
        before = x.clone()
        rotary.of(POSITIONS, ROPE, torch.float32).rotate(x)
        assert torch.equal(x, before) == kept
    x = torch.randn(ROWS, HEADS, E, requires_grad=True)
    HalvesRotary.of(POSITIONS, ROPE, torch.float32).rotate(x).sum().backward()
    assert x.grad is not None


def test_where_they_are_taken() -> None:
    assert OnCpu.rotary is NeighboursRotary
    assert issubclass(InPlace.rotary, HalvesRotary)
