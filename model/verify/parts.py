"""Parts of a model by themselves, as referees need them: the first layers, the plain pooler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.backbone import MistralBackbone
from model.config import ModelConfig
from model.platform.products import Products
from model.poolers import LatentAttention
from model.weights.checkpoint import Checkpoint
from model.weights.loader import laid_out, put, reader_of, stacked, suit
from model.weights.names import folded_sources, tensor_table


def load_backbone(
    folder: Path,
    config: ModelConfig,
    *,
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
    layers: Products,
) -> tuple[MistralBackbone, dict[str, Tensor]]:
    """The first `depth` layers and the final norm, of the products that serve; and the same tensors
    as they are on disk, in the names of transformers' MistralModel, for a referee."""
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    config = replace(config, num_hidden_layers=depth)
    with torch.device("meta"):
        backbone = MistralBackbone(config)
    suit(backbone, backbone, device, layers)
    read = reader_of(checkpoint, config, backbone)
    theirs = {}
    for parameter, sources in tensor_table(config).items():
        owner, _, name = parameter.partition(".")
        if owner == "backbone":
            values = stacked(read, sources, device, dtype)
            put(backbone, name, laid_out(backbone, name, values))
            for source in sources:
                tensor = checkpoint.rows(source.name)
                theirs[source.name.removeprefix(config.family.prefix)] = tensor
    return backbone.eval(), theirs


def load_plain_pooler(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    in_pieces: bool = False,
) -> LatentAttention:
    """The unfolded pooler, the referee of the folded one."""
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    with torch.device("meta"):
        pooler = LatentAttention(config, in_pieces=in_pieces)
    names = {ours: source.name for ours, source in folded_sources(config).items()}
    for parameter, sources in tensor_table(config).items():
        if parameter.startswith("pooler."):
            names[parameter.removeprefix("pooler.")] = sources[0].name
    for parameter, name in names.items():
        tensor = checkpoint.rows(name).to(device).to(dtype, copy=True)
        put(pooler, parameter, nn.Parameter(tensor, requires_grad=False))
    return pooler.eval()
