"""The Mistral backbone on packed tokens: Mistral-7B-v0.1's layers, under a full or a causal mask.

Knows nothing of instructions or pooling, but for one thing: rows that nobody will pool are
dropped as early as they can be, after the last layer's keys and values. Knows no processor: what
lies between the products is handed in (`use`), and so is the attention kernel.

Shapes: T packed tokens, P pooled rows, D width, H heads, K kv heads, E head width.
`sliding_window` goes with a causal mask. Under a full one it is not applied, as in the authors'
code (NV-Embed's config has one).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention.kernels import AttentionKernel
from model.config import ModelConfig
from model.linear.quantization import Float8Linear, ScaledRows
from model.operations import Differentiable, Operations
from model.packing import PackedBatch
from model.rotary import Rotary


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension; statistics in float32."""

    operations: Operations = Differentiable()
    float8 = False
    """Whether what comes out feeds a float8 product."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor | ScaledRows:
        """x [T, D] -> [T, D]."""
        return self.operations.norm(x, self.weight, self.eps, float8=self.float8)

    def add(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor | ScaledRows]:
        """-> (residual + update, the same normed)."""
        return self.operations.add_norm(residual, update, self.weight, self.eps, float8=self.float8)


class SelfAttention(nn.Module):
    """Grouped-query attention with q, k and v in one product.

    In the last layer (`split_q`) q stands apart, since it is needed on the pooled rows only.
    """

    def __init__(self, config: ModelConfig, *, split_q: bool) -> None:
        super().__init__()
        width, q_size, kv_size = config.hidden_size, config.q_size, config.kv_size
        self.head_dim = config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.causal, self.window = config.causal, config.window
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
        q = rotary.scale(q)
        out = attend(q, k, v, batch.seqs, batch.seqs, causal=self.causal, window=self.window)
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
        q, k = of_pooled.scale(of_pooled.rotate(q)), rotary.rotate(k)
        out = attend(q, k, v, batch.pooled, batch.seqs, causal=self.causal, window=self.window)
        return self.o_proj(out.flatten(1))  # type: ignore[no-any-return]

    def _by_head(self, projected: Tensor) -> Tensor:
        """[T, heads * E] -> [T, heads, E]."""
        return projected.view(len(projected), -1, self.head_dim)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    operations: Operations = Differentiable()
    float8 = False
    """Whether `down_proj` takes float8 rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        """x [T, D] -> [T, D], which may stand in x's place."""
        return self.operations.mlp(x, self.gate_up_proj, self.down_proj, float8=self.float8)


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

    operations: Operations = Differentiable()
    rotary: type[Rotary] = Differentiable.rotary
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
        self.rope = config.rope

    def use(self, operations: Operations) -> None:
        """Run these between the products. Before the weights are loaded and after the layers are
        chosen: what float8 layers read is then made so, where the operations can."""
        self.operations, self.rotary = operations, operations.rotary
        to_float8 = getattr(operations, "to_float8", None)
        for module in self.modules():
            if isinstance(module, RMSNorm | MLP):
                module.operations = operations
            elif isinstance(module, Float8Linear) and to_float8 is not None:
                module.to_rows = to_float8
            elif isinstance(module, Layer) and to_float8 is not None:
                float8 = isinstance(module.mlp.down_proj, Float8Linear)  # as are all of its layers
                for owner in (module.input_layernorm, module.post_attention_layernorm, module.mlp):
                    owner.float8 = float8

    def forward(self, batch: PackedBatch, attend: AttentionKernel) -> Tensor:
        """-> [P, D], the final norm applied."""
        embedded: Tensor = self.embed_tokens(batch.input_ids)
        rotary = self.rotary.of(batch.positions, self.rope, embedded.dtype)
        residual, update = self.operations.residual(embedded), None
        for layer in self.layers:
            residual, update = layer(residual, update, rotary, batch, attend)
        assert update is not None, "a model without layers"
        _, normed = self.norm.add(residual, update)
        assert isinstance(normed, Tensor), "the final norm feeds no float8 layer"
        return normed


def select_rows(x: Tensor, batch: PackedBatch) -> Tensor:
    """The pooled rows of x [T, …], x itself when all are."""
    return x if batch.pool_rows is None else x.index_select(0, batch.pool_rows)
