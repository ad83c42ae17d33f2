from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from model.config import NVEmbedConfig
from model.errors import CheckpointError
from tests.checkpoints import config_json

OFFICIAL: dict[str, Any] = {
    "_name_or_path": "nvidia/NV-Embed-v2",
    "model_type": "nvembed",
    "add_eos": True,
    "is_mask_instruction": True,
    "mask_type": "b",
    "latent_attention_config": {"model_type": "latent_attention"},
    "text_config": {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "model_type": "bidir_mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05,
        "sliding_window": 4096,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""What the published config.json says about the forward: no sizes for the pooler."""


def test_the_official_config_gives_the_official_sizes() -> None:
    assert NVEmbedConfig.from_dict(OFFICIAL) == NVEmbedConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_position_embeddings=32768,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        num_latents=512,
        num_cross_heads=8,
        cross_dim_head=4096,
        name="nvidia/NV-Embed-v2",
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "model_type", "mistral"),
        (None, "mask_type", "c"),
        (None, "add_eos", False),
        (None, "is_mask_instruction", False),
        (None, "text_config", None),
        (None, "latent_attention_config", "none"),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "attention_bias", True),
        ("text_config", "mlp_bias", True),
        ("text_config", "rope_scaling", {"type": "linear", "factor": 2.0}),
        ("text_config", "rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
        ("text_config", "bos_token_id", 0),
        ("text_config", "eos_token_id", 3),
        ("text_config", "hidden_size", "4096"),
        ("text_config", "num_hidden_layers", 0),
        ("text_config", "num_attention_heads", None),
        ("text_config", "num_key_value_heads", 7),
        ("text_config", "head_dim", 127),
        ("text_config", "vocab_size", True),
        ("text_config", "rope_theta", -1.0),
        ("latent_attention_config", "output_normalize", False),
        ("latent_attention_config", "hidden_dim", 1024),
        ("latent_attention_config", "latent_dim", 1024),
        ("latent_attention_config", "num_latents_value", 0),
        ("latent_attention_config", "num_cross_heads", 1.5),
        ("latent_attention_config", "cross_dim_head", "wide"),
    ],
)
def test_a_refusal_names_the_key_and_the_value(
    section: str | None, key: str, value: object
) -> None:
    raw = copy.deepcopy(OFFICIAL)
    (raw[section] if section else raw)[key] = value
    words = {
        "num_key_value_heads": "kv heads",
        "text_config": "text_config is missing",
        "rope_parameters": "rope_type is 'yarn'",
    }
    with pytest.raises(CheckpointError) as refusal:
        NVEmbedConfig.from_dict(raw)
    assert words.get(key, key) in str(refusal.value)
    if value is not None and not isinstance(raw.get(key), str | None):
        assert str(value) in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "cannot be read"), ("[]", "model_type is 'list'")],
)
def test_the_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        NVEmbedConfig.from_dir(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_transformers_5_writes_theta_elsewhere() -> None:
    raw = copy.deepcopy(OFFICIAL)
    del raw["text_config"]["rope_theta"]
    raw["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert NVEmbedConfig.from_dict(raw).rope_theta == 1e6


def test_positions_limit_the_input(tmp_path: Path) -> None:
    raw = config_json()
    raw["text_config"]["max_position_embeddings"] = 512
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert NVEmbedConfig.from_dir(tmp_path).max_input_tokens == 512
    raw["text_config"]["max_position_embeddings"] = 131_072
    assert NVEmbedConfig.from_dict(raw).max_input_tokens == 32_768
