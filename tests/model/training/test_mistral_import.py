"""A Mistral of transformers: the same backbone without its mask, and clear words for the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.attention.cpu import sdpa_by_length
from model.batch import Encoding
from model.errors import CheckpointError
from model.packing import pack
from model.training.adapters import add_lora
from model.training.attention import grouped_products
from model.training.mistral_import import is_plain_mistral, load_mistral, mistral_config
from model.training.network import TrainedNVEmbed
from tests.model.test_backbone import referee_states

CPU = torch.device("cpu")


def load(folder: Path, seed: int = 1) -> TrainedNVEmbed:
    return load_mistral(folder, mistral_config(folder), seed=seed, device=CPU)


def encodings() -> list[Encoding]:
    rng = np.random.default_rng(0)
    lengths = ((40, 18), (30, 0), (30, 29), (9, 8), (1, 0))
    return [Encoding(rng.integers(3, 32_000, n).astype(np.int32), start) for n, start in lengths]


@pytest.mark.parametrize("lora", [False, True])
def test_the_backbone_equals_transformers_without_the_mask(tiny_mistral: Path, lora: bool) -> None:
    """Its window of 4 tokens is not applied either. Adapters begin as no change at all."""
    from transformers import MistralModel

    theirs = MistralModel.from_pretrained(tiny_mistral).eval()
    ours = load(tiny_mistral)
    if lora:
        add_lora(ours, rank=4, alpha=8, dropout=0.5)
    for kernel in (sdpa_by_length, grouped_products):
        with torch.no_grad():
            states = ours.backbone(pack(encodings(), CPU), kernel)
            expected = [referee_states(theirs, e.ids)[e.pool_start :] for e in encodings()]
        torch.testing.assert_close(states, torch.cat(expected), rtol=0, atol=1e-5)


def test_names_without_their_prefix(tiny_mistral: Path, tmp_path: Path) -> None:
    """As a MistralModel is saved."""
    from transformers import MistralModel

    folder = tmp_path / "bare"
    MistralModel.from_pretrained(tiny_mistral).save_pretrained(folder)
    assert "embed_tokens.weight" in load_file(str(folder / "model.safetensors"))
    bare, whole = load(folder).state_dict(), load(tiny_mistral).state_dict()
    assert all(torch.equal(bare[name], whole[name]) for name in bare.keys() | whole.keys())


def test_the_pooler_is_new_and_drawn_by_the_seed(tiny_mistral: Path) -> None:
    first, again, other = (load(tiny_mistral, seed).pooler.state_dict() for seed in (1, 1, 2))
    assert first["latents"].shape == (4, 32)  # a latent to 8 of width, as in the paper
    assert first["to_q.weight"].shape == (8 * 32, 32)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["to_kv.weight"], other["to_kv.weight"])
    config = mistral_config(tiny_mistral, num_latents=6, num_cross_heads=2, cross_dim_head=10)
    assert (config.num_latents, config.num_cross_heads, config.cross_dim_head) == (6, 2, 10)


def test_what_config_json_leaves_out_is_transformers_default(
    tiny_mistral: Path, tmp_path: Path
) -> None:
    raw = json.loads((tiny_mistral / "config.json").read_text())
    for key in ("rms_norm_eps", "num_key_value_heads", "head_dim", "rope_parameters"):
        del raw[key]
    raw["_name_or_path"] = "mistralai/Mistral-7B-v0.1"
    raw["num_attention_heads"] = 8
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = mistral_config(tmp_path)
    assert (config.rms_norm_eps, config.num_kv_heads, config.head_dim) == (1e-6, 8, 4)
    assert config.rope.theta == 10_000
    assert config.name == "Mistral-7B-v0.1-embed"


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters is"),
        ({"rope_parameters": YARN}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"eos_token_id": 32_000}, "eos_token_id is 32000"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_key_value_heads": 3}, "do not share 3 kv heads"),
    ],
)
def test_another_architecture_is_refused(
    tiny_mistral: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    raw = json.loads((tiny_mistral / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | changes))
    with pytest.raises(CheckpointError, match=message):
        mistral_config(tmp_path)


def test_tensors_that_do_not_fit_are_named(tiny_mistral: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_mistral, folder)
    tensors = load_file(str(folder / "model.safetensors"))
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    for problem in (
        "a Mistral",
        "missing: model.norm.weight;",
        "surplus: model.layers.0.self_attn.q_proj.bias;",
        "model.layers.1.mlp.up_proj.weight has shape [2, 2], expected [48, 32]",
    ):
        assert problem in str(refused.value)


def test_it_is_known_by_its_config(tiny_mistral: Path, tiny_checkpoint: Path) -> None:
    assert is_plain_mistral(tiny_mistral)
    assert not is_plain_mistral(tiny_checkpoint)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        is_plain_mistral(tiny_data := tiny_mistral / "nothing")
    assert not tiny_data.exists()
