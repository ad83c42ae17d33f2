"""The backbone against transformers' MistralModel under a full mask, on random weights."""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.attention.cpu import sdpa_by_length
from model.attention.kernels import AttentionKernel, sdpa_padded
from model.backbone import MistralBackbone
from model.batch import Encoding
from model.config import ModelConfig, Rope
from model.fused import Fused
from model.linear.packed_linear import MKLLinear, OneDNNLinear, PackedLinear, replace_linears
from model.operations import Differentiable, InPlace, OnCpu, Operations
from model.packing import pack
from model.rotary import as_neighbours
from model.weights.names import Source, tensor_table
from tests.model import fused_stand_in as stand_in

if TYPE_CHECKING:
    from transformers import MistralModel

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,  # not width / heads
    intermediate_size=72,
    max_position_embeddings=32768,
    rope=Rope(12, 10000.0),
    rms_norm_eps=1e-5,
    num_latents=8,
    num_cross_heads=2,
    cross_dim_head=16,
)


def referee(config: ModelConfig, *, sliding_window: int | None = None) -> MistralModel:
    """transformers' model with random weights of a size that makes attention matter."""
    from transformers import MistralConfig, MistralModel  # here: it takes a second

    torch.manual_seed(0)
    theirs = MistralModel(
        MistralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            sliding_window=sliding_window,
            initializer_range=0.25,
            attn_implementation="sdpa",
        )
    )
    for name, parameter in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return theirs.eval().requires_grad_(False)


def referee_states(theirs: MistralModel, ids: np.ndarray) -> Tensor:
    """-> [T, D]; the mask is given whole (0 everywhere), so that no causal one is made."""
    full = torch.zeros(1, 1, len(ids), len(ids))
    input_ids = torch.from_numpy(ids).long()[None]
    states: Tensor = theirs(input_ids, attention_mask=full, use_cache=False).last_hidden_state[0]
    return states


SERVED: dict[str, type[nn.Module]] = {"as served, plain": nn.Linear}
if platform.machine() in ("x86_64", "AMD64"):
    if torch.backends.mkl.is_available():
        SERVED["as served, MKL"] = MKLLinear
    if torch.backends.mkldnn.is_available():
        SERVED["as served, oneDNN"] = OneDNNLinear
FORMS = ("with gradients", "as checkpoints", "fused", *SERVED)
TOLERANCE = dict.fromkeys(FORMS, 3e-5) | {"with gradients": 1e-5}
"""Absolute, on states of up to 4. Sums in another order than transformers': either is up to 1e-5
from the same in float64."""


def operations_of(form: str) -> Operations:
    if form in SERVED:
        return OnCpu(mlp_by_rows=SERVED[form] is MKLLinear)
    return {
        "with gradients": Differentiable(),
        "as checkpoints": InPlace(),
        "fused": Fused(stand_in.launch),
    }[form]


def our_states(
    theirs: MistralModel,
    config: ModelConfig,
    encodings: list[Encoding],
    kernel: AttentionKernel,
    form: str,
) -> Tensor:
    """The same weights, through the loader's table of names: for training, as GPUs have them, and
    as this processor does."""
    backbone = MistralBackbone(config)
    backbone.use(operations_of(form))
    weights = {f"embedding_model.{name}": value for name, value in theirs.state_dict().items()}

    def rows(source: Source) -> Tensor:
        values = weights.pop(source.name)
        served = form in SERVED and source.rotated
        return as_neighbours(values, config.head_dim) if served else values

    fused = {
        name.removeprefix("backbone."): torch.cat([rows(source) for source in sources])
        for name, sources in tensor_table(config).items()
        if name.startswith("backbone.")
    }
    assert not weights, f"left over: {list(weights)}"
    backbone.load_state_dict(fused)
    packed = SERVED.get(form, nn.Linear)
    if issubclass(packed, PackedLinear):
        replace_linears(backbone, packed)
        for layer in backbone.modules():
            if isinstance(layer, PackedLinear):
                layer.weight = layer.packed(layer.weight.detach())
    with torch.inference_mode(form != "with gradients"):
        states: Tensor = backbone.eval()(pack(encodings, CPU), kernel)
    return states.detach()


def encoding(length: int, pool_start: int = 0, seed: int = 0) -> Encoding:
    ids = np.random.default_rng([length, seed]).integers(0, CONFIG.vocab_size, length)
    return Encoding(ids.astype(np.int32), pool_start)


def test_the_referee_is_bidirectional() -> None:
    theirs = referee(CONFIG, sliding_window=4)
    ids = encoding(40).ids
    changed = ids.copy()
    changed[-1] = (changed[-1] + 1) % CONFIG.vocab_size
    moved = (referee_states(theirs, ids) - referee_states(theirs, changed)).abs().amax(-1)
    assert (moved > 1e-4).all(), "a causal or sliding mask was applied"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [sdpa_by_length, sdpa_padded])
def test_equals_transformers_on_mixed_lengths(kernel: AttentionKernel, form: str) -> None:
    theirs = referee(CONFIG)
    lengths = [1, 17, 5, 64, 5, 130, 2, 100, 90, 40]  # more rows than are normed at a time
    encodings = [encoding(n, seed=i) for i, n in enumerate(lengths)]
    states = our_states(theirs, CONFIG, encodings, kernel, form)
    expected = torch.cat([referee_states(theirs, e.ids) for e in encodings])
    assert states.shape == (sum(map(len, encodings)), CONFIG.hidden_size)
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [sdpa_by_length, sdpa_padded])
def test_equals_transformers_on_the_pooled_rows(kernel: AttentionKernel, form: str) -> None:
    theirs = referee(CONFIG)
    encodings = [encoding(40, 18), encoding(9, 8), encoding(30, 0), encoding(40, 18, seed=1)]
    states = our_states(theirs, CONFIG, encodings, kernel, form)
    expected = torch.cat([referee_states(theirs, e.ids)[e.pool_start :] for e in encodings])
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE[form])


TWO_LAYERS = replace(CONFIG, num_hidden_layers=2)


@cache
def states_at_4096_tokens() -> tuple[MistralModel, Tensor]:
    """A referee and its states, which every form of ours is to have."""
    theirs = referee(TWO_LAYERS)
    return theirs, referee_states(theirs, encoding(4096).ids)


@pytest.mark.whole
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pool_start", [0, 4000])
def test_equals_transformers_at_4096_tokens(pool_start: int, form: str) -> None:
    theirs, expected = states_at_4096_tokens()
    encodings = [encoding(4096, pool_start), encoding(3)]
    states = our_states(theirs, TWO_LAYERS, encodings, sdpa_by_length, form)
    torch.testing.assert_close(states[:-3], expected[pool_start:], rtol=0, atol=TOLERANCE[form])


@pytest.mark.parametrize("form", FORMS)
def test_one_layer_is_both_the_first_and_the_last(form: str) -> None:
    config = replace(CONFIG, num_hidden_layers=1)
    theirs = referee(config)
    short = encoding(11, 4)
    states = our_states(theirs, config, [short], sdpa_by_length, form)
    expected = referee_states(theirs, short.ids)[4:]
    torch.testing.assert_close(states, expected, rtol=0, atol=TOLERANCE[form])
