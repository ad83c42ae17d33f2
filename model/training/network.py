"""The module that is trained: Embedder with the plain latent pooler, or its family's own.

Parameter names are those of `model.weights.names`, so that `export` needs no other map.
Shapes: N sequences, D width.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.kernels import AttentionKernel
from model.backbone import MistralBackbone
from model.config import ModelConfig
from model.errors import CheckpointError
from model.families import Family
from model.packing import PackedBatch, Segments
from model.poolers import SERVED, LatentAttention
from model.weights.checkpoint import Checkpoint
from model.weights.names import folded_sources, tensor_table


def ablated(family: Family, pooling: str, *, causal: bool) -> Family:
    """The family with another pooler ("eos": the last row) and mask: an ablation, not served."""
    pooler = "last" if pooling == "eos" else pooling
    return replace(family, pooler=pooler, mask="causal" if causal else "full")  # type: ignore[arg-type]


class TrainedNVEmbed(nn.Module):
    """Backbone and pooler of a family; out of the pool stays what stays out when it is served."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MistralBackbone(config)
        plain = {**SERVED, "latent": LatentAttention}
        self.pooler = plain[config.family.pooler](config)

    def forward(self, batch: PackedBatch, attend: AttentionKernel) -> Tensor:
        """-> float32 [N, D], each row of length 1."""
        return F.normalize(self.pooled(batch, batch.pooled, attend), dim=-1)

    def pooled(self, batch: PackedBatch, runs: Segments, attend: AttentionKernel) -> Tensor:
        """-> float32 [W, D], of each run of the pooled rows, of any length."""
        return self.pooler(self.backbone(batch, attend), runs).float()  # type: ignore[no-any-return]


def sources(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Parameter -> (checkpoint tensor, rows) of the tensors stacked to make it."""
    table = {
        parameter: [(source.name, source.shape[0]) for source in stack]
        for parameter, stack in tensor_table(config).items()
    }
    for parameter, source in folded_sources(config).items():
        table[f"pooler.{parameter}"] = [(source.name, source.shape[0])]
    return table


def load_trained(
    folder: Path,
    *,
    device: torch.device,
    projections: torch.dtype = torch.float32,
    family: str = "auto",
    pooling: str = "latent",
    causal: bool = False,
) -> TrainedNVEmbed:
    """A checkpoint of a family as a trainable module, float32. Raises CheckpointError.

    projections: the dtype of the layers' matrices, for those that are frozen.
    family: as in ModelConfig.from_dir. pooling, causal: of an ablation of nv-embed, which leaves
    the checkpoint's pooler out unless it is "latent"; other families have their own.
    """
    config = ModelConfig.from_dir(folder, family)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    if config.family.pooler == "latent":
        config = replace(config, family=ablated(config.family, pooling, causal=causal))
    elif pooling != "latent" or causal:
        raise CheckpointError(f"{folder} is a {config.family.name} model: no ablation begins there")
    return assemble(
        config,
        {
            parameter: stacked(checkpoint, parameter, [n for n, _ in stack], device, projections)
            for parameter, stack in sources(config).items()
        },
    )


def stacked(
    checkpoint: Checkpoint,
    parameter: str,
    names: list[str],
    device: torch.device,
    projections: torch.dtype,
) -> Tensor:
    """The value of one parameter on the device: the named tensors, end to end."""
    layers = parameter.startswith("backbone.layers.") and parameter.endswith("_proj.weight")
    dtype = projections if layers else torch.float32
    return torch.cat([checkpoint.rows(name).to(device, dtype) for name in names])


def assemble(config: ModelConfig, state: dict[str, Tensor]) -> TrainedNVEmbed:
    """The module of these values, which it takes over as they are."""
    with torch.device("meta"):
        model = TrainedNVEmbed(config)
    model.load_state_dict(state, assign=True)
    return model


@torch.no_grad()
def initialise_weights(
    model: TrainedNVEmbed, generator: torch.Generator, *, only: str = ""
) -> None:
    """Normal weights; projections back into the residual start near zero.

    So the untrained model is close to a mean of its token embeddings, a fair place to start; a
    new pooler (`only="pooler."`) behind a trained backbone, to a mean of its hidden states.
    """
    width = model.config.hidden_size
    for name, parameter in model.named_parameters():
        if not name.startswith(only):
            continue
        if parameter.dim() == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        std = width**-0.5
        if name.endswith(("o_proj.weight", "down_proj.weight", "to_out.weight")):
            std *= 0.1
        elif name.endswith(("embed_tokens.weight", "latents")):
            std = 1.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
