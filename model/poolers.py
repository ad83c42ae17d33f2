"""Poolers: what makes one vector of the pooled rows of each sequence, not yet normalised.

The latent-attention pooler (paper, section 3.1) comes plain and folded.

`LatentAttention` is the published formula, parameter for parameter: for training and as the
referee. `FoldedLatentAttention` is what serves: the latents are constants after training, so
per head `Wq` and the keys collapse into one matrix, the values and `Wo` into another. It is
exact algebra; 34 M parameters instead of 537 M at the official size.

A row takes more memory there than in the backbone, most of it eight times its width and in float32.
So what serves takes many rows in pieces, whose sums are added up.

Shapes: P pooled rows, N sequences, D width, L latents, H cross heads, C cross head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.packing import Segments

LAYER_NORM_EPS = 1e-5
_ROWS_AT_A_TIME = 4096
"""Pooled rows: so few that the pooler takes less memory than the backbone for 8,192, and so many
that its products stay large."""
_SHORT = 8
"""Rows of a segment, on average, below which a gradient's way through all at once is quicker."""


def segment_mean(x: Tensor, segments: Segments) -> Tensor:
    """x [P, …] -> float32 [N, …]: the mean of each segment's rows, filler left out."""
    return _reduced(x, segments, "mean")


def _reduced(x: Tensor, segments: Segments, how: str) -> Tensor:
    """x [P, …] -> float32 [N, …]: the "mean" or the "sum" of each segment's rows."""
    if x.requires_grad and len(x) < _SHORT * segments.num_seqs:  # one by one takes longer
        rows = x[: sum(segments.lengths)].float()
        lengths = torch.tensor(segments.lengths, device=x.device)
        owners = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
        sums = rows.new_zeros(len(lengths), *x.shape[1:]).index_add(0, owners, rows)
        return sums / lengths[:, None] if how == "mean" else sums
    if x.device.type == "cpu":  # segment_reduce is a scalar loop there
        rows = x[: sum(segments.lengths)]
        parts = torch.split(rows, list(segments.lengths)) if segments.num_seqs > 1 else (rows,)
        of_rows = torch.mean if how == "mean" else torch.sum
        return torch.stack([of_rows(part, 0, dtype=torch.float32) for part in parts])
    lengths = segments.cu_seqlens.diff()
    return torch.segment_reduce(x.float(), how, lengths=lengths, axis=0, unsafe=True)


def means_of(
    rows_of: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,
    segments: Segments,
    *,
    in_pieces: bool,
) -> list[Tensor]:
    """x [P, …] -> float32 [N, …] for each tensor that `rows_of` makes of some rows of x: the mean
    of each segment's rows."""
    if len(x) <= _ROWS_AT_A_TIME or not in_pieces:
        return [segment_mean(made, segments) for made in rows_of(x)]
    totals: list[Tensor] | None = None
    for first in range(0, len(x), _ROWS_AT_A_TIME):
        piece = x[first : first + _ROWS_AT_A_TIME]
        inside = segments.between(first, first + len(piece))
        sums = [_reduced(made, inside, "sum") for made in rows_of(piece)]
        if totals is not None:
            sums = [total.add_(more) for total, more in zip(totals, sums, strict=True)]
        totals = sums
    assert totals is not None
    lengths = segments.cu_seqlens.diff()[:, None]
    return [total.div_(lengths) for total in totals]


class MeanPooler(nn.Module):
    """The mean of the pooled rows; of one row, as where the last is pooled, that row."""

    def __init__(self, config: ModelConfig) -> None:
        """It has no parameters."""
        super().__init__()

    def forward(self, h: Tensor, pooled: Segments) -> Tensor:
        """h [P, D] -> float32 [N, D]."""
        return segment_mean(h, pooled)


class PooledFeedForward(nn.Module):
    """mean over rows of `W2(value * gelu(gate)) + h`, (value, gate) = W1·LayerNorm(h) + b1.

    The mean commutes with W2, so it comes first: W2 runs once per sequence. Exact (erf) GELU.
    """

    def __init__(self, config: ModelConfig, *, in_pieces: bool) -> None:
        """in_pieces: many rows go through in pieces, and what is not needed any more is
        overwritten, so that no gradient can pass."""
        super().__init__()
        self.in_pieces = in_pieces
        width, inner = config.hidden_size, config.feed_forward_size
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.up_proj = nn.Linear(width, 2 * inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, attended: Callable[[Tensor], Tensor], h: Tensor, pooled: Segments) -> Tensor:
        """The h of the formula is `attended` of some rows of `h` [P, D] -> float32 [N, D]."""

        def rows_of(piece: Tensor) -> tuple[Tensor, Tensor]:
            piece = attended(piece)
            return self._gated(piece), piece

        mean, mean_of_h = means_of(rows_of, h, pooled, in_pieces=self.in_pieces)
        return self.down_proj(mean.to(h.dtype)).float() + mean_of_h  # type: ignore[no-any-return]

    def _gated(self, h: Tensor) -> Tensor:
        value, gate = self.up_proj(self.norm(h)).chunk(2, dim=-1)
        if self.in_pieces:
            return F.gelu(gate).mul_(value)
        return value * F.gelu(gate)  # type: ignore[no-any-return]


class LatentAttention(nn.Module):
    """The plain latent pooler: cross-attention from tokens to latents, feed-forward, mean."""

    def __init__(self, config: ModelConfig, *, in_pieces: bool = False) -> None:
        """in_pieces: as for PooledFeedForward."""
        super().__init__()
        width, inner = config.hidden_size, config.num_cross_heads * config.cross_dim_head
        self.num_heads = config.num_cross_heads
        self.latents = nn.Parameter(torch.empty(config.num_latents, width))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_context = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.feed_forward = PooledFeedForward(config, in_pieces=in_pieces)

    def forward(self, h: Tensor, pooled: Segments) -> Tensor:
        """h [P, D] -> float32 [N, D], not yet normalised."""
        keys, values = self.to_kv(self.norm_context(self.latents)).chunk(2, dim=-1)
        k, v = self._by_head(keys), self._by_head(values)

        def attended(rows: Tensor) -> Tensor:
            q = self._by_head(self.to_q(self.norm(rows)))
            out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            return self.to_out(out.transpose(0, 1).flatten(1)) + rows  # type: ignore[no-any-return]

        return self.feed_forward(attended, h, pooled)  # type: ignore[no-any-return]

    def _by_head(self, x: Tensor) -> Tensor:
        """[rows, H·C] -> [H, rows, C]."""
        return torch.unflatten(x, -1, (self.num_heads, -1)).transpose(0, 1)


class FoldedLatentAttention(nn.Module):
    """The same function with the latents' keys and values folded into the projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, slots = config.hidden_size, config.num_cross_heads * config.num_latents
        self.num_heads = config.num_cross_heads
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.to_latents = nn.Linear(width, slots, bias=False)  # D -> H·L
        self.from_latents = nn.Linear(slots, width, bias=False)  # H·L -> D
        self.feed_forward = PooledFeedForward(config, in_pieces=True)

    def forward(self, h: Tensor, pooled: Segments) -> Tensor:
        """h [P, D] -> float32 [N, D], not yet normalised."""
        return self.feed_forward(self._attended, h, pooled)  # type: ignore[no-any-return]

    def _attended(self, h: Tensor) -> Tensor:
        scores = self.to_latents(self.norm(h)).unflatten(-1, (self.num_heads, -1))
        return self.from_latents(scores.softmax(dim=-1).flatten(1)) + h  # type: ignore[no-any-return]


SERVED: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "latent": FoldedLatentAttention,
    "mean": MeanPooler,
    "last": MeanPooler,
}
"""By Family.pooler: a module that takes (h [P, D], pooled) to float32 [N, D]."""


def normed_latents(latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What keys and values are made of, in float32: LayerNorm(latents) [L, D]."""
    width = latents.shape[-1]
    return F.layer_norm(latents.float(), (width,), weight.float(), bias.float(), eps=LAYER_NORM_EPS)


def fold_keys(context: Tensor, to_k: Tensor, to_q: Tensor) -> Tensor:
    """One head: context [L, D], to_k [C, D], to_q [C, D] -> rows of `to_latents` [L, D].

    q·k / sqrt(C) = (Wq·x)·(Wk·c) / sqrt(C) = ((Wk·c)·Wq / sqrt(C))·x. In float32.
    """
    scale = 1 / math.sqrt(to_q.shape[0])
    return (context @ to_k.float().T) @ to_q.float() * scale


def fold_values(context: Tensor, to_v: Tensor, to_out: Tensor) -> Tensor:
    """One head: context [L, D], to_v [C, D], to_out [D, C] -> columns of `from_latents` [D, L]."""
    return to_out.float() @ (context @ to_v.float().T).T
