"""Gradient caching (Gao et al. 2021): a loss over many vectors with the graph of only a few.

A loss over all pairs of a batch needs every vector at once, but not every graph. The vectors are
computed without one, the loss gives the gradient of each, and each part runs again, now with its
graph, into which its share of that gradient goes. Twice the forwards, a part's memory, the same
gradients. Knows nothing of texts, models or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def split_by_tokens(lengths: Sequence[int], limit: int | None) -> list[slice]:
    """Consecutive items of at most `limit` tokens in all, at least one item to a slice."""
    if limit is None:
        return [slice(0, len(lengths))]
    cuts, total = [0], 0
    for index, length in enumerate(lengths):
        if total + length > limit and index > cuts[-1]:
            cuts.append(index)
            total = 0
        total += length
    return [slice(*pair) for pair in pairwise([*cuts, len(lengths)])]


def backward(
    parts: Sequence[Part], embed: Callable[[Part], Tensor], loss_of: Callable[[Tensor], Tensor]
) -> None:
    """Add to the parameters the gradient of loss_of(cat(embed(part) for part in parts)).

    embed: a part -> its vectors [n, D]; loss_of: all vectors [N, D] -> a scalar. The random
    numbers that `embed` draws (dropout) are drawn again in its second run.
    """
    if len(parts) == 1:
        loss_of(embed(parts[0])).backward()  # type: ignore[no-untyped-call]
        return
    states, pieces = [], []
    with torch.no_grad():
        for part in parts:
            states.append(rng_state())
            pieces.append(embed(part))
    vectors = torch.cat(pieces).requires_grad_()
    loss_of(vectors).backward()  # type: ignore[no-untyped-call]
    assert vectors.grad is not None
    after = rng_state()
    bounds = accumulate((len(piece) for piece in pieces), initial=0)
    for part, state, (start, stop) in zip(parts, states, pairwise(bounds), strict=True):
        set_rng_state(state)
        embed(part).backward(vectors.grad[start:stop])  # type: ignore[no-untyped-call]
    set_rng_state(after)


def rng_state() -> dict[str, Tensor]:
    """The states of torch's generators: the CPU's and, where there is one, the current GPU's."""
    state = {"torch_rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Go on from `rng_state()`; a GPU's state is left alone where none was kept."""
    torch.set_rng_state(state["torch_rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
