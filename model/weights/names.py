"""The names of a checkpoint's tensors in one table: their shapes, and which parameters they make.

The official layout (v1 and v2: 304 tensors). Knows no file and no value; torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig

_LATENT = "latent_attention_model."
_CROSS = _LATENT + "cross_attend_blocks.0."
_FEED_FORWARD = _LATENT + "cross_attend_blocks.1."


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    rotated: bool = False
    """Wq and Wk, whose rows make the pairs that model.rotary turns."""


def tensor_table(config: ModelConfig) -> dict[str, list[Source]]:
    """Parameter of Embedder -> the checkpoint tensors that are stacked (dim 0) to make it.

    The two folded parameters of the pooler are not here: see `folded_sources`.
    """
    width, inter = config.hidden_size, config.intermediate_size
    table: dict[str, list[Source]] = {}

    def add(parameter: str, *sources: tuple[str, tuple[int, ...]] | Source) -> None:
        table[parameter] = [s if isinstance(s, Source) else Source(*s) for s in sources]

    add(
        "backbone.embed_tokens.weight",
        (f"{config.family.prefix}embed_tokens.weight", (config.vocab_size, width)),
    )
    for index in range(config.num_hidden_layers):
        ours = f"backbone.layers.{index}."
        theirs = f"{config.family.prefix}layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{ours}{norm}.weight", (f"{theirs}{norm}.weight", (width,)))
        q = Source(theirs + "self_attn.q_proj.weight", (config.q_size, width), rotated=True)
        k = Source(theirs + "self_attn.k_proj.weight", (config.kv_size, width), rotated=True)
        v = (theirs + "self_attn.v_proj.weight", (config.kv_size, width))
        if index < config.num_hidden_layers - 1:
            add(ours + "self_attn.qkv_proj.weight", q, k, v)
        else:
            add(ours + "self_attn.q_proj.weight", q)
            add(ours + "self_attn.kv_proj.weight", k, v)
        add(
            ours + "self_attn.o_proj.weight",
            (theirs + "self_attn.o_proj.weight", (width, config.q_size)),
        )
        add(
            ours + "mlp.gate_up_proj.weight",
            (theirs + "mlp.gate_proj.weight", (inter, width)),
            (theirs + "mlp.up_proj.weight", (inter, width)),
        )
        add(
            ours + "mlp.down_proj.weight",
            (theirs + "mlp.down_proj.weight", (width, inter)),
        )
    add("backbone.norm.weight", (f"{config.family.prefix}norm.weight", (width,)))
    if config.family.pooler != "latent":
        return table

    inner = config.feed_forward_size
    for ours, theirs, shape in (
        ("norm.weight", _CROSS + "norm.weight", (width,)),
        ("norm.bias", _CROSS + "norm.bias", (width,)),
        ("feed_forward.norm.weight", _FEED_FORWARD + "norm.weight", (width,)),
        ("feed_forward.norm.bias", _FEED_FORWARD + "norm.bias", (width,)),
        ("feed_forward.up_proj.weight", _FEED_FORWARD + "fn.net.0.weight", (2 * inner, width)),
        ("feed_forward.up_proj.bias", _FEED_FORWARD + "fn.net.0.bias", (2 * inner,)),
        ("feed_forward.down_proj.weight", _FEED_FORWARD + "fn.net.2.weight", (width, inner)),
        ("feed_forward.down_proj.bias", _FEED_FORWARD + "fn.net.2.bias", (width,)),
    ):
        add("pooler." + ours, (theirs, shape))
    return table


def folded_sources(config: ModelConfig) -> dict[str, Source]:
    """Parameter of the plain LatentAttention -> the tensor that only the fold reads."""
    if config.family.pooler != "latent":
        return {}
    width, inner = config.hidden_size, config.num_cross_heads * config.cross_dim_head
    return {
        "latents": Source(_LATENT + "latents", (config.num_latents, width)),
        "norm_context.weight": Source(_CROSS + "norm_context.weight", (width,)),
        "norm_context.bias": Source(_CROSS + "norm_context.bias", (width,)),
        "to_q.weight": Source(_CROSS + "fn.to_q.weight", (inner, width)),
        "to_kv.weight": Source(_CROSS + "fn.to_kv.weight", (2 * inner, width)),  # keys, values
        "to_out.weight": Source(_CROSS + "fn.to_out.weight", (width, inner)),
    }


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config holds: name -> shape."""
    sources = [s for stack in tensor_table(config).values() for s in stack]
    sources += folded_sources(config).values()
    return {source.name: source.shape for source in sources}
