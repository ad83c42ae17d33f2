from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers

from model.config import ModelConfig, Rope
from model.errors import CheckpointError
from tests.checkpoints import config_json
from tests.model.test_files import IN_PLACE_OF_A_FILE
from tests.siblings import SIBLINGS

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
    assert ModelConfig.from_dict(OFFICIAL) == ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        num_hidden_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        max_position_embeddings=32768,
        rope=Rope(128, 10000.0),
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
        ("text_config", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("text_config", "bos_token_id", 0),
        ("text_config", "eos_token_id", 3),
        ("text_config", "hidden_size", "4096"),
        ("text_config", "num_hidden_layers", 0),
        ("text_config", "num_attention_heads", None),
        ("text_config", "num_key_value_heads", 7),
        ("text_config", "head_dim", 127),
        ("text_config", "vocab_size", True),
        ("text_config", "rope_theta", -1.0),
        (None, "matryoshka_dimensions", [0]),
        (None, "matryoshka_dimensions", [4097]),
        (None, "matryoshka_dimensions", [128, "64"]),
        (None, "matryoshka_dimensions", [True]),
        (None, "matryoshka_dimensions", 64.0),
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
    }
    with pytest.raises(CheckpointError) as refusal:
        ModelConfig.from_dict(raw)
    assert words.get(key, key) in str(refusal.value)
    if value is not None and not isinstance(raw.get(key), str | None):
        assert str(value) in str(refusal.value)


HUGE = 10**400


@pytest.mark.parametrize(
    ("section", "key", "values"),
    [
        (
            "text_config",
            "rope_theta",
            (math.nan, math.inf, -math.inf, HUGE, 1e13, 0.5, 0, "1e4", [1e4], {}, True),
        ),
        (
            "text_config",
            "rms_norm_eps",
            (math.nan, math.inf, HUGE, 1.0, 1e-30, 0, "1e-5", [], True),
        ),
        ("text_config", "num_hidden_layers", (10**6, 10**9, HUGE, 1e1, math.nan, True, [3], "3")),
        ("text_config", "hidden_size", (HUGE, 10**9, -64, math.inf, 64.0)),
        ("text_config", "vocab_size", (HUGE, 10**9, 2, 32e3)),
        ("text_config", "intermediate_size", (HUGE, 10**9, math.nan, "160")),
        ("text_config", "num_attention_heads", (10**6, 1e1)),
        ("text_config", "num_key_value_heads", (10**6, 2.0, True)),
        ("text_config", "head_dim", (HUGE, 10**5, 128.0, [128])),
        ("text_config", "max_position_embeddings", (1, 31, HUGE, 32768.0, math.inf, True)),
        ("latent_attention_config", "num_latents_value", (HUGE, 10**7, True, 512.0)),
        ("latent_attention_config", "num_cross_heads", (HUGE, 10**5, True)),
        ("latent_attention_config", "cross_dim_head", (HUGE, 10**7, math.inf)),
        ("latent_attention_config", "hidden_dim", (4096.0, "4096", math.nan)),
        ("text_config", "bos_token_id", (True, 1.0, "1", [1])),
        ("text_config", "attention_bias", (0, "false", [])),
        ("text_config", "rope_parameters", ("x", [], 1, True)),
        (None, "add_eos", (1, "true")),
        (None, "_name_or_path", (["x"], 1, {}, True)),
        (None, "text_config", ("x", [], 1)),
        (None, "model_type", (["nvembed"], {"nvembed": 1}, HUGE)),
    ],
)
def test_every_number_is_within_bounds_and_of_its_type(
    section: str | None, key: str, values: tuple[object, ...]
) -> None:
    for value in values:
        raw = copy.deepcopy(OFFICIAL)
        (raw[section] if section else raw)[key] = value
        with pytest.raises(CheckpointError, match=key) as refusal:
            ModelConfig.from_dict(raw)
        assert str(value)[:100] in str(refusal.value)
        assert len(str(refusal.value)) < 300


def test_theta_said_twice() -> None:
    raw = copy.deepcopy(OFFICIAL)
    raw["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000}
    assert ModelConfig.from_dict(raw).rope.theta == 10000.0
    for other in (1e6, math.nan, 10**400, "10000"):
        raw["text_config"]["rope_parameters"]["rope_theta"] = other
        with pytest.raises(CheckpointError, match="rope_theta"):
            ModelConfig.from_dict(raw)


def test_a_byte_order_mark_and_what_the_file_is_not(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(OFFICIAL), encoding="utf-8-sig")
    assert ModelConfig.from_dir(tmp_path) == ModelConfig.from_dict(OFFICIAL)
    for content, message in IN_PLACE_OF_A_FILE:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            ModelConfig.from_dir(tmp_path)
    for depth in (900, 20_000):  # read, and too deep to read
        file.write_text('{"model_type":' + "[" * depth + "]" * depth + "}")
        with pytest.raises(CheckpointError, match=r"model_type|nested too deeply"):
            ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no config.json"), ("{", "cannot be read"), ("[]", "holds list, no object")],
)
def test_the_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        ModelConfig.from_dir(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_transformers_5_writes_theta_elsewhere() -> None:
    raw = copy.deepcopy(OFFICIAL)
    del raw["text_config"]["rope_theta"]
    raw["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    assert ModelConfig.from_dict(raw).rope.theta == 1e6


def test_positions_limit_the_input(tmp_path: Path) -> None:
    raw = config_json()
    raw["text_config"]["max_position_embeddings"] = 512
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_dir(tmp_path).max_input_tokens == 512
    raw["text_config"]["max_position_embeddings"] = 131_072
    assert ModelConfig.from_dict(raw).max_input_tokens == 32_768


@pytest.mark.parametrize(
    ("name", "heads", "epsilon", "window"),
    [("e5-mistral", 8, 1e-6, 4096), ("nemotron-3-embed", 8, 1e-5, None)],
)
def test_what_is_not_said_is_what_transformers_takes(
    name: str, heads: int, epsilon: float, window: int | None
) -> None:
    said = {**SIBLINGS[name].config, "num_attention_heads": 16, "head_dim": 4}
    for key in ("num_key_value_heads", "rms_norm_eps", "sliding_window"):
        said.pop(key, None)
    config = ModelConfig.from_dict(said, name)
    assert (config.num_kv_heads, config.rms_norm_eps) == (heads, epsilon)
    assert config.sliding_window == window
    kinds = {"mistral": "MistralConfig", "ministral3": "Ministral3Config"}
    theirs = getattr(transformers, kinds[said["model_type"]])
    settings = theirs(**{key: value for key, value in said.items() if key != "model_type"})
    assert (settings.num_key_value_heads, settings.rms_norm_eps) == (heads, epsilon)
    assert settings.sliding_window == window


def test_matryoshka_dimensions_are_those_below_the_width() -> None:
    raw = copy.deepcopy(OFFICIAL) | {"matryoshka_dimensions": [64, 4096, 1024, 64]}
    assert ModelConfig.from_dict(raw).matryoshka_dimensions == (1024, 64)
    assert ModelConfig.from_dict(OFFICIAL).matryoshka_dimensions == ()
