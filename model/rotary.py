"""Rotary position embeddings (RoPE, arXiv 2104.09864) of the packed tokens of one batch.

Which numbers of a head make a pair is a matter of layout. In a checkpoint it is (i, i + E/2). On
a CPU the loader lays the rows of Wq and Wk so that a pair's are neighbours: q and k change alike,
so no score does, and one complex product turns what otherwise takes five passes over half heads.

Letters: T rows, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, Self

import torch
from torch import Tensor


class Rotary(Protocol):
    """The angles of T rows, for all layers and heads alike."""

    @classmethod
    def of(cls, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Self:
        """positions [T] -> the angles for queries and keys of `dtype`, computed in float32."""
        ...

    def rotate(self, x: Tensor) -> Tensor:
        """x [T, heads, E], turned; some do it in place."""
        ...

    def select(self, rows: Tensor) -> Self:
        """Those of `rows` alone."""
        ...


@dataclass(frozen=True, slots=True)
class HalvesRotary:
    """Pairs (i, i + E/2), as in checkpoints."""

    cos: Tensor  # [T, 1, E/2]
    sin: Tensor

    @classmethod
    def of(cls, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Self:
        angles = _angles(positions, head_dim, theta)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = self.cos, self.sin
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.cos.index_select(0, rows), self.sin.index_select(0, rows))


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

    turns: Tensor  # [T, 1, E/2] complex, of length 1

    @classmethod
    def of(cls, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Self:
        angles = _angles(positions, head_dim, theta)
        return cls(torch.complex(angles.cos(), angles.sin()))

    def rotate(self, x: Tensor) -> Tensor:
        wide = x.float()  # x itself in float32
        torch.view_as_complex(torch.unflatten(wide, -1, (-1, 2))).mul_(self.turns)
        return x if wide is x else x.copy_(wide)

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.turns.index_select(0, rows))


def as_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Wq or Wk [heads * E, I] of a checkpoint with each head's rows in NeighboursRotary's order."""
    halves = torch.unflatten(weight, 0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """[T, 1, E/2] in float32."""
    of_device = _on_cpu if positions.device.type == "cpu" else _frequencies
    return positions[:, None, None] * of_device(head_dim, theta, positions.device)


def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    """[E/2] in float32."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    return 1.0 / theta ** (exponents / head_dim)


_on_cpu = lru_cache(maxsize=8)(_frequencies)
"""Once: the five operations are a hundredth of a lone text's forward."""
