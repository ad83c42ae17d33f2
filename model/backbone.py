"""The bidirectional Mistral backbone on packed tokens (Mistral-7B-v0.1 without its causal mask).

Knows nothing of instructions or pooling, but for one thing: rows that nobody will pool are
dropped as early as they can be, after the last layer's keys and values.

Shapes: T packed tokens, P pooled rows, D width, H heads, K kv heads, E head width.
`sliding_window` is in the official config and not applied, as in the reference.

Beside the matrix products time goes into memory traffic, so without gradients what is not needed
any more is overwritten: the residual by its sum with an update, q and k by their rotated selves,
and on the CPU the update by the normed sum. There the residual is kept in float32, which spares
the norms two passes. On a GPU `use` puts model.fused in place of torch's operations.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.kernels import AttentionKernel
from model.config import ModelConfig
from model.fused import Fused
from model.linear.packed_linear import MKLLinear
from model.linear.quantization import Float8Linear, ScaledRows
from model.packing import PackedBatch
from model.rotary import HalvesRotary, Rotary

_ROWS_AT_A_TIME = 256
"""In RMSNorm.add on the CPU, and in MLPs with MKL's layers: what one operation leaves is in the
cache for the next."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension; statistics in float32."""

    fused: Fused | None = None
    float8 = False
    """Whether what comes out is quantized; only with `fused`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor | ScaledRows:
        """x [T, D] -> [T, D]."""
        if self.fused is not None:
            return self.fused.norm(x, None, self.weight, self.eps, float8=self.float8)
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self._norm(x, torch.empty_like(x, dtype=self.weight.dtype))

    def add(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor | ScaledRows]:
        """-> (residual + update, the same normed in update's dtype). Without gradients `residual`
        is overwritten, on the CPU `update`, too."""
        if self.fused is not None:
            norm = self.fused.norm
            return residual, norm(residual, update, self.weight, self.eps, float8=self.float8)
        if torch.is_grad_enabled():
            residual = residual + update
            return residual, self(residual)
        if residual.device.type != "cpu":
            return residual.add_(update), self(residual)
        if len(residual) <= _ROWS_AT_A_TIME:
            return residual, self._norm(residual.add_(update), update)
        parts = (torch.split(x, _ROWS_AT_A_TIME) for x in (residual, update))
        for rows, added in zip(*parts, strict=True):
            self._norm(rows.add_(added), added)
        return residual, update

    def _norm(self, x: Tensor, out: Tensor) -> Tensor:
        """For the CPU, where rms_norm is a row of operations, each over all of x."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        squares = torch.addcmul(_number(self.eps), length, length, value=1 / x.shape[-1])
        return torch.mul(x, squares.rsqrt_(), out=out).mul_(self.weight)


@lru_cache(maxsize=8)
def _number(value: float) -> Tensor:
    """As a tensor, for operations that take no plain number there."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


class SelfAttention(nn.Module):
    """Grouped-query attention with q, k and v in one product.

    In the last layer (`split_q`) q stands apart, since it is needed on the pooled rows only.
    """

    def __init__(self, config: ModelConfig, *, split_q: bool) -> None:
        super().__init__()
        width, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        if split_q:
            self.q_proj = nn.Linear(width, q_size, bias=False)
            self.kv_proj = nn.Linear(width, 2 * kv_size, bias=False)
        else:
            self.qkv_proj = nn.Linear(width, q_size + 2 * kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, width, bias=False)

    def forward(
        self,
        x: Tensor | ScaledRows,
        rotary: Rotary,
        batch: PackedBatch,
        attend: AttentionKernel,
    ) -> Tensor:
        """x [T, D], all rows in, all rows out."""
        q_heads, k_heads, v_heads = self.heads
        qkv = self._by_head(self.qkv_proj(x))
        qk, v = qkv.split_with_sizes([q_heads + k_heads, v_heads], dim=1)
        q, k = rotary.rotate(qk).split_with_sizes([q_heads, k_heads], dim=1)
        out = attend(q, k, v, batch.seqs, batch.seqs)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]

    def forward_pooled(
        self,
        x: Tensor | ScaledRows,
        rotary: Rotary,
        batch: PackedBatch,
        attend: AttentionKernel,
    ) -> Tensor:
        """x [T, D] -> [P, D]: keys and values of all rows, queries of the pooled rows."""
        k, v = torch.chunk(self._by_head(self.kv_proj(x)), 2, dim=1)
        of_queries = select_rows(x, batch) if isinstance(x, Tensor) else x.select(batch.pool_rows)
        q = self._by_head(self.q_proj(of_queries))
        of_pooled = rotary if batch.pool_rows is None else rotary.select(batch.pool_rows)
        out = attend(of_pooled.rotate(q), rotary.rotate(k), v, batch.pooled, batch.seqs)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]

    def _by_head(self, projected: Tensor) -> Tensor:
        """[T, heads * E] -> [T, heads, E]."""
        return projected.view(len(projected), -1, self.head_dim)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    fused: Fused | None = None
    float8 = False
    """Whether `down_proj` takes float8 rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]. With MKL's layers in x's place."""
        if self.fused is not None:
            active = self.fused.silu_up(self.gate_up_proj(x), float8=self.float8)
            return self.down_proj(active)  # type: ignore[no-any-return]
        if torch.is_grad_enabled():
            gate, up = self._gate_up(x)
            return self.down_proj(F.silu(gate) * up)  # type: ignore[no-any-return]
        if not isinstance(self.gate_up_proj, MKLLinear):
            gate, up = self._gate_up(x)
            # A GPU's memory is scarce; oneDNN is faster on an input that does not lie apart.
            active = F.silu(gate, inplace=x.device.type != "cpu").mul_(up)
            return self.down_proj(active)  # type: ignore[no-any-return]
        # MKL is as fast with few rows (oneDNN is not), and copies an input that lies apart.
        for rows in torch.split(x, _ROWS_AT_A_TIME):
            gate, up = self._gate_up(rows)
            rows.copy_(self.down_proj(F.silu(gate).mul_(up)))
        return x

    def _gate_up(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.gate_up_proj(x).chunk(2, dim=-1)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and MLP, each on a normed copy beside the residual.

    What the MLP adds to the residual is left to the next norm, which then does both in one go.
    """

    def __init__(self, config: ModelConfig, *, last: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, split_q=last)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.last = last

    def forward(
        self,
        residual: Tensor,
        update: Tensor | None,
        rotary: Rotary,
        batch: PackedBatch,
        attend: AttentionKernel,
    ) -> tuple[Tensor, Tensor]:
        """residual [T, D] and what is still to be added to it -> the same of the next layer, in
        the last one [P, D]."""
        if update is None:
            normed = self.input_layernorm(residual)
        else:
            residual, normed = self.input_layernorm.add(residual, update)
        if self.last:
            attended = self.self_attn.forward_pooled(normed, rotary, batch, attend)
            residual = select_rows(residual, batch)
        else:
            attended = self.self_attn(normed, rotary, batch, attend)
        residual, normed = self.post_attention_layernorm.add(residual, attended)
        return residual, self.mlp(normed)


class MistralBackbone(nn.Module):
    """Token ids to final hidden states of the rows that are pooled."""

    rotary: type[Rotary] = HalvesRotary
    """How the rows of Wq and Wk lie."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Unset, as all parameters are until they are loaded. nn.Embedding's own normal values
        # cost 1.6 s and 74 MB on meta tensors: torch imports its decompositions for them.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(
            Layer(config, last=index == last) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta

    def use(self, fused: Fused) -> None:
        """Run these kernels between the products. For inference on a GPU, before the weights are
        loaded and after the layers are chosen: what float8 layers read is then made so."""
        self.rotary = fused.rotary()
        for module in self.modules():
            if isinstance(module, RMSNorm | MLP):
                module.fused = fused
            elif isinstance(module, Float8Linear):
                module.to_rows = fused.to_float8
            elif isinstance(module, Layer):
                float8 = isinstance(module.mlp.down_proj, Float8Linear)  # as are all of its layers
                for owner in (module.input_layernorm, module.post_attention_layernorm, module.mlp):
                    owner.float8 = float8

    def forward(self, batch: PackedBatch, attend: AttentionKernel) -> Tensor:
        """-> [P, D], the final norm applied."""
        residual: Tensor = self.embed_tokens(batch.input_ids)
        update: Tensor | None = None
        rotary = self.rotary.of(batch.positions, self.head_dim, self.rope_theta, residual.dtype)
        if residual.device.type == "cpu" and not torch.is_grad_enabled():
            residual = residual.float()
        for layer in self.layers:
            residual, update = layer(residual, update, rotary, batch, attend)
        assert update is not None, "a model without layers"
        _, normed = self.norm.add(residual, update)
        assert isinstance(normed, Tensor), "the final norm feeds no float8 layer"
        return normed


def select_rows(x: Tensor, batch: PackedBatch) -> Tensor:
    """The pooled rows of x [T, …], x itself when all are."""
    return x if batch.pool_rows is None else x.index_select(0, batch.pool_rows)
