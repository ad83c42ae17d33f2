"""The arithmetic of one forward at the official size, counted on meta tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.attention.kernels import choose_kernel
from model.batch import Encoding
from model.config import ModelConfig
from model.packing import pack
from model.weights.loader import empty_model
from model.weights.names import expected_shapes
from tests.model.test_config import OFFICIAL
from tests.model.torches import COUNTED_VARLEN
from tests.siblings import SIBLINGS

META = torch.device("meta")
CONFIG = ModelConfig.from_dict(OFFICIAL)
D, INTER, Q, KV, LAYERS = 4096, 14336, 4096, 1024, 32
SLOTS, FF = 8 * 512, 16384  # the folded pooler's heads·latents, the feed-forward's width


def count(
    encodings: list[Encoding], kernel: str, config: ModelConfig = CONFIG
) -> tuple[int, dict[str, int]]:
    """Floating-point operations: (all, by module)."""
    model = empty_model(config, dtype=torch.bfloat16)
    _, attend = choose_kernel(kernel, META, torch.bfloat16)
    counter = FlopCounterMode(display=False, depth=8)
    with counter, torch.inference_mode():
        model(pack(encodings, META, pooled=config.family.pooled), attend)
    by_module = {
        module.removeprefix("Embedder."): sum(flops.values())
        for module, flops in counter.get_flop_counts().items()
    }
    return counter.get_total_flops(), by_module


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def attention(seqs: int, queries: int, keys: int) -> int:
    """q·kᵀ and weights·v of all heads."""
    return seqs * 2 * 2 * queries * keys * Q


def layer(rows: int, pooled: int) -> int:
    """The products of one layer, attention proper aside: keys and values of all rows, the rest
    of the `pooled` ones."""
    return (
        linear(rows, D, 2 * KV)
        + linear(pooled, D, Q)
        + linear(pooled, Q, D)
        + linear(pooled, D, 2 * INTER)
        + linear(pooled, INTER, D)
    )


def folded_pooler(rows: int) -> int:
    """Per token: to the latents, back, and the feed-forward's first linear."""
    return linear(rows, D, SLOTS) + linear(rows, SLOTS, D) + linear(rows, D, 2 * FF)


def encodings(count: int, length: int, pool_start: int) -> list[Encoding]:
    return [Encoding(np.ones(length, dtype=np.int32), pool_start) for _ in range(count)]


@pytest.mark.parametrize("kernel", ["sdpa", COUNTED_VARLEN])
def test_short_passages(kernel: str) -> None:
    """16 passages of 20 tokens: the last linear runs once for each, nothing runs twice."""
    total, _ = count(encodings(16, 20, 0), kernel)
    rows = 16 * 20
    expected = (
        LAYERS * (layer(rows, rows) + attention(16, 20, 20))
        + folded_pooler(rows)
        + linear(16, FF, D)
    )
    assert expected <= total <= 1.02 * expected


@pytest.mark.parametrize("kernel", ["sdpa", COUNTED_VARLEN])
def test_instructed_queries(kernel: str) -> None:
    """16 queries of 40 tokens, 18 left out: the last layer and the pooler see 22 rows of each.

    The CPU's kernel rounds 40 and 22 up to 48 and 32, in attention alone."""
    total, modules = count(encodings(16, 40, 18), kernel)
    rows, pooled = 16 * 40, 16 * 22
    last = f"backbone.layers.{LAYERS - 1}."
    assert modules[last + "self_attn.kv_proj"] == linear(rows, D, 2 * KV)
    assert modules[last + "self_attn.q_proj"] == linear(pooled, D, Q)
    assert modules[last + "self_attn.o_proj"] == linear(pooled, Q, D)
    assert modules[last + "mlp"] == linear(pooled, D, 2 * INTER) + linear(pooled, INTER, D)
    assert modules["pooler"] == folded_pooler(pooled) + linear(16, FF, D)
    long, short = (48, 32) if kernel == "sdpa" else (40, 22)
    expected = (
        (LAYERS - 1) * (layer(rows, rows) + attention(16, long, long))
        + layer(rows, pooled)
        + attention(16, short, long)
        + folded_pooler(pooled)
        + linear(16, FF, D)
    )
    assert total == expected


def sibling(name: str, **other: object) -> ModelConfig:
    """One of that family at the 7B size."""
    sizes = {key: OFFICIAL["text_config"][key] for key in SIZES}
    raw = {**SIBLINGS[name].config, **sizes, "head_dim": 128, **other}
    return ModelConfig.from_dict(raw, SIBLINGS[name].family)


SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
SIZES += ("num_key_value_heads",)


def test_of_a_last_row_only_that_row_is_computed() -> None:
    """16 texts of 48 tokens: the last layer's q, o and MLP see one row of each."""
    total, modules = count(encodings(16, 48, 0), "sdpa", sibling("e5-mistral"))
    rows = 16 * 48
    last = f"backbone.layers.{LAYERS - 1}."
    assert modules[last + "self_attn.kv_proj"] == linear(rows, D, 2 * KV)
    assert modules[last + "self_attn.q_proj"] == linear(16, D, Q)
    assert modules[last + "self_attn.o_proj"] == linear(16, Q, D)
    assert modules[last + "mlp"] == linear(16, D, 2 * INTER) + linear(16, INTER, D)
    expected = (
        (LAYERS - 1) * (layer(rows, rows) + attention(16, 48, 48))
        + layer(rows, 16)
        + attention(16, 16, 48)  # rounded up from one query
    )
    assert total == expected


def test_causal_attention_of_a_long_text_is_half_of_the_full_one() -> None:
    config = sibling("e5-mistral", num_hidden_layers=2)
    flops = count(encodings(1, 4096, 0), "sdpa", config)[1]["backbone.layers.0.self_attn"]
    attended = flops - linear(4096, D, Q + 2 * KV) - linear(4096, Q, D)
    assert 0.5 < attended / attention(1, 4096, 4096) < 0.54
    window = sibling("e5-mistral", num_hidden_layers=2, sliding_window=512)
    flops = count(encodings(1, 4096, 0), "sdpa", window)[1]["backbone.layers.0.self_attn"]
    attended = flops - linear(4096, D, Q + 2 * KV) - linear(4096, Q, D)
    assert attended / attention(1, 4096, 4096) < 0.2


@pytest.mark.parametrize(("name", "family"), [(name, one.family) for name, one in SIBLINGS.items()])
def test_each_sibling_at_the_7b_size(name: str, family: str) -> None:
    config = sibling(name)
    assert config.family.name == family
    shapes = expected_shapes(config)
    assert len(shapes) == 2 + 9 * LAYERS
    trunk = sum(math.prod(shape) for shape in shapes.values())
    assert trunk == 7_110_660_096 + D * (config.vocab_size - 32_000)
    assert {p.device.type for p in empty_model(config).parameters()} == {"meta"}


def test_the_official_checkpoint_has_304_tensors_of_7_851_016_192_parameters() -> None:
    shapes = expected_shapes(CONFIG)
    assert len(shapes) == 304
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_851_016_192
    pooler = "latent_attention_model.cross_attend_blocks.0.fn."
    assert shapes[pooler + "to_q.weight"] == (32768, 4096)
    assert shapes[pooler + "to_kv.weight"] == (65536, 4096)
    assert shapes[pooler + "to_out.weight"] == (4096, 32768)
    assert shapes["embedding_model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["embedding_model.layers.31.mlp.down_proj.weight"] == (4096, 14336)
    folded = {"to_latents": (4096, 4096), "from_latents": (4096, 4096)}
    parameters = dict(empty_model(CONFIG).named_parameters())
    for name, shape in folded.items():
        assert parameters[f"pooler.{name}.weight"].shape == shape
