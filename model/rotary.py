"""Rotary position embeddings (RoPE, arXiv 2104.09864) of the packed tokens of one batch.

Which numbers of a head make a pair is a matter of layout. In a checkpoint it is (i, i + E/2). On
a CPU the loader lays the rows of Wq and Wk so that a pair's are neighbours: q and k change alike,
so no score does, and one complex product turns what otherwise takes five passes over half heads.

Long contexts are had by yarn (arXiv 2309.00071), which slows the low frequencies down and
sharpens the scores, and by Llama 4's scaling of queries by their position.

Letters: T rows, E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor

from model.config import Rope


class Rotary(Protocol):
    """The angles of T rows, for all layers and heads alike."""

    @classmethod
    def of(cls, positions: Tensor, rope: Rope, dtype: torch.dtype) -> Self:
        """positions [T] -> the angles for queries and keys of `dtype`, computed in float32."""
        ...

    def rotate(self, x: Tensor) -> Tensor:
        """x [T, heads, E], turned; some do it in place."""
        ...

    def scale(self, q: Tensor) -> Tensor:
        """Turned queries [T, heads, E], multiplied by what their positions ask for."""
        ...

    def select(self, rows: Tensor) -> Self:
        """Those of `rows` alone."""
        ...


@dataclass(frozen=True, slots=True)
class HalvesRotary:
    """Pairs (i, i + E/2), as in checkpoints."""

    cos: Tensor  # [T, 1, E/2]
    sin: Tensor
    of_queries: Tensor | None = None  # [T, 1, 1]

    @classmethod
    def of(cls, positions: Tensor, rope: Rope, dtype: torch.dtype) -> Self:
        angles, sharpness = _angles(positions, rope), rope.sharpness
        cos, sin = angles.cos(), angles.sin()
        if sharpness != 1.0:
            cos, sin = cos * sharpness, sin * sharpness
        return cls(cos.to(dtype), sin.to(dtype), _of_queries(positions, rope, dtype))

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos, self.sin
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def scale(self, q: Tensor) -> Tensor:
        return q if self.of_queries is None else q * self.of_queries

    def select(self, rows: Tensor) -> Self:
        of_queries = None if self.of_queries is None else self.of_queries.index_select(0, rows)
        cos, sin = self.cos.index_select(0, rows), self.sin.index_select(0, rows)
        return type(self)(cos, sin, of_queries)


class InPlaceRotary(HalvesRotary):
    """The same in place: no gradient can pass."""

    __slots__ = ()

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = first * self.sin
        first.mul_(self.cos).addcmul_(second, self.sin, value=-1)
        second.mul_(self.cos).add_(turned)
        return x


@dataclass(frozen=True, slots=True)
class NeighboursRotary:
    """Pairs (2i, 2i + 1), after `as_neighbours`. Always in place, and in float32."""

    turns: Tensor  # [T, 1, E/2] complex, of length 1 without yarn
    of_queries: Tensor | None = None  # [T, 1, 1]

    @classmethod
    def of(cls, positions: Tensor, rope: Rope, dtype: torch.dtype) -> Self:
        angles, sharpness = _angles(positions, rope), rope.sharpness
        turns = torch.complex(angles.cos(), angles.sin())
        if sharpness != 1.0:
            turns = turns * sharpness
        return cls(turns, _of_queries(positions, rope, dtype))

    def rotate(self, x: Tensor) -> Tensor:
        wide = x.float()  # x itself in float32
        torch.view_as_complex(torch.unflatten(wide, -1, (-1, 2))).mul_(self.turns)
        return x if wide is x else x.copy_(wide)

    def scale(self, q: Tensor) -> Tensor:
        return q if self.of_queries is None else q * self.of_queries

    def select(self, rows: Tensor) -> Self:
        of_queries = None if self.of_queries is None else self.of_queries.index_select(0, rows)
        return type(self)(self.turns.index_select(0, rows), of_queries)


def as_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Wq or Wk [heads * E, I] of a checkpoint with each head's rows in NeighboursRotary's order."""
    halves = torch.unflatten(weight, 0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _angles(positions: Tensor, rope: Rope) -> Tensor:
    """[T, 1, E/2] in float32."""
    of_device = _on_cpu if positions.device.type == "cpu" else _frequencies
    return positions[:, None, None] * of_device(rope, positions.device)


def _of_queries(positions: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor | None:
    """[T, 1, 1] what queries are multiplied by: 1 + beta·ln(1 + floor(position / original))."""
    if not rope.query_beta:
        return None
    times = torch.floor(positions[:, None, None].float() / rope.original_positions)
    return (1 + rope.query_beta * torch.log1p(times)).to(dtype)


def _frequencies(rope: Rope, device: torch.device) -> Tensor:
    """[E/2] in float32."""
    exponents = torch.arange(0, rope.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / rope.theta ** (exponents / rope.head_dim)
    if rope.factor == 1.0:
        return frequencies
    # Of what turns often within the original context nothing is slowed down, of what turns less
    # than `beta_slow` times all, and in between a part.
    low, high = (math.floor(rope.turning(rope.beta_fast)), math.ceil(rope.turning(rope.beta_slow)))
    low, high = max(low, 0), min(high, rope.head_dim - 1)
    places = torch.arange(rope.head_dim // 2, device=device, dtype=torch.float32)
    slowed = ((places - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / rope.factor * slowed + frequencies * (1 - slowed)


_on_cpu = lru_cache(maxsize=8)(_frequencies)
"""Once: the five operations are a hundredth of a lone text's forward."""
