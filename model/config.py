"""ModelConfig: a checkpoint's settings, read into its family and the numbers of the forward.

Refuses what the forward does not compute, so that a checkpoint of another kind stops the start
instead of giving wrong vectors. Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.detection import recognise
from model.errors import CheckpointError, MissingFileError
from model.families import NV_EMBED, Family
from model.files import read_json, shown
from model.sentence_transformers_files import SentenceTransformersFiles

# The official file's latent_attention_config holds no sizes: these are the published code's
# defaults (configuration_nvembed.py).
_DEFAULT_NUM_LATENTS = 512
_DEFAULT_CROSS_HEADS = 8
_DEFAULT_CROSS_DIM_HEAD = 4096

_DEFAULTS: Mapping[str, Mapping[str, int | float | None]] = {
    "mistral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096},
    "nvembed": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6},
    "ministral3": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "head_dim": 128},
}
"""By model_type: what transformers computes with where config.json does not have a key."""

_BOUNDS: dict[str, tuple[float, float]] = {
    "vocab_size": (3, 2**22),
    "hidden_size": (1, 2**16),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "head_dim": (2, 1024),
    "intermediate_size": (1, 2**20),
    # BOS, a short instruction, a few words and EOS.
    "max_position_embeddings": (32, 2**31),
    "sliding_window": (1, 2**31),
    "rope_theta": (1, 1e12),
    "factor": (1, 1e6),
    "original_max_position_embeddings": (1, 2**31),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale": (0, 1e3),
    "mscale_all_dim": (0, 1e3),
    "attention_factor": (1e-3, 1e3),
    "llama_4_scaling_beta": (0, 1e3),
    "rms_norm_eps": (1e-12, 0.1),
    "num_latents_value": (1, 2**16),
    "num_cross_heads": (1, 1024),
    "cross_dim_head": (1, 2**16),
}
"""What each number may be. A model of this kind with others does not exist, and a wrong number
would take all memory, or change the vectors without a word."""


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn queries and keys (model.rotary)."""

    head_dim: int  # E
    theta: float
    factor: float = 1.0  # of yarn, by which the lowest frequencies are slowed down; 1: no yarn
    original_positions: int = 0  # before yarn, which the next five are of
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    sharpness: float = 1.0  # cos and sin are multiplied by it
    query_beta: float = 0.0  # of Llama 4's scaling of queries; 0: none

    def turning(self, times: float) -> float:
        """The pair, as a fraction of one, that turns so many times in the original context."""
        positions = self.original_positions / (2 * math.pi * times)
        return self.head_dim * math.log(positions) / (2 * math.log(self.theta))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Family and sizes of one model. Letters as in backbone.py: D, H, K, E, L."""

    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    intermediate_size: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float
    num_latents: int = 0  # L; as the next two, of the latent pooler
    num_cross_heads: int = 0
    cross_dim_head: int = 0
    family: Family = NV_EMBED
    sliding_window: int | None = None  # rows that one sees, itself included
    name: str | None = None  # `_name_or_path`: who the weights are, for the licence notice
    advised_tokens: int = 32_768  # of one input, unless the operator allows more
    matryoshka_dimensions: tuple[int, ...] = ()
    """Below D: so many first numbers of a vector were trained to be one, too."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> prefix, as the folder's sentence-transformers files have them."""

    @classmethod
    def from_dir(
        cls, folder: Path, family: str = "auto", model_id: str | None = None
    ) -> ModelConfig:
        """Read the settings in `folder`. Raises CheckpointError with what is wrong and where.

        family: its name, which what is found must not contradict; auto: by what is found.
        model_id: the hub's, where the folder came from there.
        """
        path = folder / "config.json"
        try:
            raw = read_json(path)
        except MissingFileError:
            raise CheckpointError(
                f"{folder} has no config.json; a checkpoint folder holds config.json, "
                "tokenizer.json and *.safetensors"
            ) from None
        files = SentenceTransformersFiles.of(folder)
        try:
            return cls.from_dict(raw, family, model_id, files)
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def from_dict(
        cls,
        raw: dict[str, Any],
        family: str = "auto",
        model_id: str | None = None,
        files: SentenceTransformersFiles | None = None,
    ) -> ModelConfig:
        """Build from the parsed JSON of a config.json, and what else lies in its folder."""
        files = files or SentenceTransformersFiles()
        return cls._of(raw, recognise(raw, files, family, model_id), files)

    @classmethod
    def _of(
        cls, raw: dict[str, Any], family: Family, files: SentenceTransformersFiles
    ) -> ModelConfig:
        text = raw if family.section is None else _section(raw, family.section)
        text = {**_DEFAULTS.get(family.model_type, {}), **text}
        for key, (value, why) in family.required.items():
            _require(raw, key, value, why)
        _require(text, "hidden_act", "silu", "the MLP computes SiLU")
        _require(text, "attention_bias", False, "the projections have no biases")
        _require(text, "mlp_bias", False, "the projections have no biases")
        _require(text, "bos_token_id", 1, "the tokenizer puts BOS = 1 in front")
        _require(text, "eos_token_id", 2, "EOS is id 2")

        hidden = _integer(text, "hidden_size")
        heads = _integer(text, "num_attention_heads")
        kv_heads = _integer(text, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(f"{heads} query heads do not share {kv_heads} kv heads evenly")
        head_dim = _integer(text, "head_dim", hidden // heads)
        if head_dim % 2:
            raise CheckpointError(f"head_dim {head_dim} is odd; RoPE rotates pairs")
        return cls(
            vocab_size=_integer(text, "vocab_size"),
            hidden_size=hidden,
            num_hidden_layers=_integer(text, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_integer(text, "intermediate_size"),
            max_position_embeddings=_integer(text, "max_position_embeddings"),
            rope=_rope(text, head_dim),
            rms_norm_eps=_number(text, "rms_norm_eps", 1e-5),
            **(_latent_sizes(raw, hidden) if family.pooler == "latent" else {}),
            family=family,
            sliding_window=_window(text, family),
            name=_text(raw, "_name_or_path"),
            advised_tokens=min(family.advised_tokens, files.max_seq_length or 32_768),
            matryoshka_dimensions=_matryoshka(raw, hidden),
            prompts=files.prompts,
        )

    @property
    def causal(self) -> bool:
        return self.family.mask == "causal"

    @property
    def window(self) -> int | None:
        """Of the causal mask: what its kernels apply."""
        return self.sliding_window if self.causal else None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def feed_forward_size(self) -> int:
        """The inner width of the latent pooler's feed-forward, as published."""
        return 4 * self.hidden_size

    @property
    def widest_product(self) -> tuple[int, int]:
        """Inputs and outputs of the largest linear layer: gate and up together."""
        return self.hidden_size, 2 * self.intermediate_size

    @property
    def max_input_tokens(self) -> int:
        """The longest input, unless the operator allows a longer one."""
        return min(self.advised_tokens, self.most_input_tokens)

    @property
    def most_input_tokens(self) -> int:
        """The longest input that can be computed right: positions, at most 32,768."""
        within = 32_768 if self.causal else self.sliding_window or 32_768
        return min(self.max_position_embeddings, 32_768, within)


def _latent_sizes(raw: dict[str, Any], hidden: int) -> dict[str, int]:
    """Those of the latent pooler behind a backbone of this width."""
    latent = _section(raw, "latent_attention_config")
    _require(latent, "output_normalize", True, "vectors are always normalised")
    for key in ("hidden_dim", "latent_dim"):
        # None in the official file, where the published default is the backbone's width.
        _require(latent, key, hidden, "the pooler is as wide as the backbone")
    return {
        "num_latents": _integer(latent, "num_latents_value", _DEFAULT_NUM_LATENTS),
        "num_cross_heads": _integer(latent, "num_cross_heads", _DEFAULT_CROSS_HEADS),
        "cross_dim_head": _integer(latent, "cross_dim_head", _DEFAULT_CROSS_DIM_HEAD),
    }


def _window(text: dict[str, Any], family: Family) -> int | None:
    """The sliding window, where there is one and it is applied. transformers applies it under a
    causal mask, and from both sides under a full one that config.json asks for; the remote code of
    NV-Embed and GritLM does not."""
    applied = family.mask == "causal" or text.get("is_causal") is False
    if not applied or text.get("sliding_window") is None:
        return None
    return _integer(text, "sliding_window")


def _rope(text: dict[str, Any], head_dim: int) -> Rope:
    # The second is how transformers 5 writes it, also for what is not scaled.
    said = [key for key in ("rope_scaling", "rope_parameters") if text.get(key) is not None]
    rope = _section(text, said[-1]) if said else {}
    theta = _number(rope, "rope_theta", _number(text, "rope_theta", 10000.0))
    if text.get("rope_theta") not in (None, theta):
        raise CheckpointError(
            f"rope_theta is {shown(text['rope_theta'])}, and {theta} in rope_parameters"
        )
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return Rope(head_dim, theta)
    if kind != "yarn":
        raise CheckpointError(f"{said[-1]} is {shown(rope)}: only yarn and 'default' are supported")
    _require(rope, "truncate", True, "yarn's bounds are rounded outwards")
    for key in ("factor", "original_max_position_embeddings"):
        if rope.get(key) is None:
            raise CheckpointError(f"yarn's {key} is missing")
    factor = _number(rope, "factor", 1.0)
    if rope.get("attention_factor") is not None:
        sharpness = _number(rope, "attention_factor", 1.0)
    else:
        mscale, of_all = _number(rope, "mscale", 0.0), _number(rope, "mscale_all_dim", 0.0)
        both = mscale and of_all
        sharpness = _sharpness(factor, mscale if both else 1.0)
        sharpness /= _sharpness(factor, of_all) if both else 1.0
    return Rope(
        head_dim,
        theta,
        factor,
        _integer(rope, "original_max_position_embeddings"),
        _number(rope, "beta_fast", 32.0),
        _number(rope, "beta_slow", 1.0),
        sharpness,
        _number(rope, "llama_4_scaling_beta", 0.0),
    )


def _sharpness(factor: float, mscale: float) -> float:
    """Of yarn, for a context that is `factor` times as long (arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _section(raw: dict[str, Any], key: str) -> dict[str, Any]:
    section = raw.get(key)
    if section is None:
        raise CheckpointError(f"{key} is missing")
    if not isinstance(section, dict):
        raise CheckpointError(f"{key} is {shown(section)}, an object is needed")
    return section


def _require(section: dict[str, Any], key: str, value: object, why: str) -> None:
    """Refuse a key that is present with another value; absent and null mean the default."""
    found = section.get(key)
    if found is not None and (type(found) is not type(value) or found != value):
        raise CheckpointError(f"{key} is {shown(found)}, only {value!r} is supported: {why}")


def _integer(section: dict[str, Any], key: str, default: int | None = None) -> int:
    value = section.get(key)
    value = default if value is None else value
    least, most = _BOUNDS[key]
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"{key} is {shown(value)}, not an integer of {least} to {most}")
    return value


def _number(section: dict[str, Any], key: str, default: float) -> float:
    value = section.get(key)
    value = default if value is None else value
    least, most = _BOUNDS[key]
    # NaN is in no range; an integer may be too large for a float, and is compared as it is.
    if type(value) not in (int, float) or not least <= value <= most:
        raise CheckpointError(
            f"{key} is {shown(value)}, a number of {least:g} to {most:g} is needed"
        )
    return float(value)


def _matryoshka(raw: dict[str, Any], hidden: int) -> tuple[int, ...]:
    """`matryoshka_dimensions`, which vLLM reads, too: the largest first, without D itself."""
    value = raw.get("matryoshka_dimensions")
    listed = value if isinstance(value, list) else [value]
    if value is None:
        return ()
    if not all(type(width) is int and 1 <= width <= hidden for width in listed):
        raise CheckpointError(
            f"matryoshka_dimensions is {shown(value)}, not a list of integers of 1 to {hidden}"
        )
    return tuple(sorted({*listed} - {hidden}, reverse=True))


def _text(section: dict[str, Any], key: str) -> str | None:
    value = section.get(key)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{key} is {shown(value)}, a text is needed")
    return value or None
