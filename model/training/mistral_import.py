"""A plain Mistral checkpoint, as transformers saves it -> a module to train, its pooler new.

MistralModel or MistralForCausalLM (whose lm_head is not needed). The causal mask goes, and with
it the sliding window, as in NV-Embed itself, whose base has one of 4,096. Everything else that
the backbone does not compute is refused.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.errors import CheckpointError, UntoldFamilyError
from model.files import read_json
from model.training.network import TrainedNVEmbed, assemble, initialise_weights, stacked
from model.weights.checkpoint import Checkpoint, check_shapes
from model.weights.names import tensor_table

logger = logging.getLogger("nv_embed.training")
_OURS = "embedding_model."  # what NV-Embed's layout puts before the backbone's names


def is_plain_mistral(folder: Path, family: str = "auto") -> bool:
    """Whether the folder holds a Mistral that is to become an NV-Embed: nothing in it says which
    family it is, or `family` is nv-embed. Raises CheckpointError for what is neither."""
    if _raw(folder).get("model_type") != "mistral":
        return False
    if family == "auto":
        try:
            ModelConfig.from_dir(folder)
        except UntoldFamilyError:
            return True
    return family == "nv-embed"


def mistral_config(
    folder: Path,
    *,
    num_latents: int | None = None,
    num_cross_heads: int | None = None,
    cross_dim_head: int | None = None,
) -> ModelConfig:
    """The sizes of the model that the folder's backbone and a new pooler make.

    The pooler's defaults are the paper's at its width, 4,096, and in proportion elsewhere: D / 8
    latents, 8 cross heads of width D. Raises CheckpointError for what the backbone does not
    compute.
    """
    raw = _raw(folder)
    width = raw.get("hidden_size")
    width = width if isinstance(width, int) else 0  # refused below, by its name
    pooler = {
        "num_latents_value": num_latents or max(1, width // 8),
        "num_cross_heads": num_cross_heads or 8,
        "cross_dim_head": cross_dim_head or width,
    }
    # Saved by an older transformers, it has a hub id or a path of another machine in it.
    name = f"{Path(str(raw.get('_name_or_path') or folder.resolve())).name}-embed"
    parts: dict[str, Any] = {"text_config": raw, "latent_attention_config": pooler}
    try:
        config = ModelConfig.from_dict({"model_type": "nvembed", "_name_or_path": name} | parts)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    if config.rope.factor != 1:
        raise CheckpointError(f"{folder / 'config.json'}: a model with yarn is not trained so far")
    if raw.get("sliding_window"):
        logger.info(
            "the sliding window of %s tokens goes with the causal mask, as in NV-Embed",
            raw["sliding_window"],
        )
    return config


def load_mistral(
    folder: Path,
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device,
    projections: torch.dtype = torch.float32,
) -> TrainedNVEmbed:
    """The checkpoint's backbone and a new pooler, drawn by the seed; float32 but for the layers'
    matrices, which are `projections`. Raises CheckpointError naming the tensors that do not fit."""
    checkpoint = Checkpoint(folder)
    found = {
        name: shape
        for name, shape in checkpoint.shapes().items()
        # The output layer, and a table that old versions saved.
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    }
    prefix = "model." if any(name.startswith("model.") for name in found) else ""
    tables = {p: s for p, s in tensor_table(config).items() if p.startswith("backbone.")}
    check_shapes(
        {_theirs(s.name, prefix): s.shape for stack in tables.values() for s in stack},
        found,
        "a Mistral",
    )
    state = {
        parameter: stacked(
            checkpoint, parameter, [_theirs(s.name, prefix) for s in stack], device, projections
        )
        for parameter, stack in tables.items()
    }
    with torch.device("meta"):
        pooler = TrainedNVEmbed(config).pooler
    for name, parameter in pooler.named_parameters():
        state[f"pooler.{name}"] = torch.empty(parameter.shape, device=device)
    model = assemble(config, state)
    initialise_weights(model, torch.Generator().manual_seed(seed), only="pooler.")
    return model


def _theirs(name: str, prefix: str) -> str:
    return prefix + name.removeprefix(_OURS)


def _raw(folder: Path) -> dict[str, Any]:
    raw = read_json(folder / "config.json")
    return raw if isinstance(raw, dict) else {}
