"""LoRA (Hu et al. 2021) on the backbone's projections, through peft.

The backbone's fused products (q, k and v; gate and up) are taken apart first, so that each of
the seven projections of a layer has adapters of its own, as in the paper's recipe: one pair for a
fused product would make q, k and v share their A. What is exported is merged and fused again.
"""

from __future__ import annotations

import importlib
import logging

import torch
from torch import Tensor, nn

from model.errors import UnsupportedError
from model.extras import how_to_install
from model.training.network import TrainedNVEmbed
from model.weights.names import tensor_table

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"


class SplitLinear(nn.Module):
    """A fused product as its parts, named as in the checkpoint; x [T, D] -> their outputs
    side by side."""

    def __init__(self, fused: nn.Linear, rows: dict[str, int]) -> None:
        super().__init__()
        parts = torch.split(fused.weight.detach(), list(rows.values()))
        for name, weight in zip(rows, parts, strict=True):
            with torch.device("meta"):
                part = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            part.weight = nn.Parameter(weight)
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def add_lora(model: TrainedNVEmbed, *, rank: int, alpha: float, dropout: float) -> None:
    """Freeze the backbone and give its projections adapters; the pooler stays trained whole.

    The adapters are float32 and leave the function as it is: their B is zero. Their A comes from
    torch's generator. Raises UnsupportedError without peft.
    """
    # Of 4-bit products on the CPU, which nothing here asks for, and yet warned of when imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        peft = importlib.import_module("peft")
    except ImportError:
        raise UnsupportedError(f"lora_rank needs peft: {how_to_install('training')}") from None
    for parameter, stack in tensor_table(model.config).items():
        if len(stack) > 1:
            path = parameter.removesuffix(".weight")
            rows = {source.name.split(".")[-2]: source.shape[0] for source in stack}
            model.set_submodule(path, SplitLinear(model.get_submodule(path), rows))  # type: ignore[arg-type]
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(PROJECTIONS)
    )
    peft.inject_adapter_in_model(config, model.backbone, adapter_name=_ADAPTER)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # peft takes the frozen weight's dtype


def merged_weight(model: nn.Module, name: str) -> Tensor:
    """The parameter `name` of TrainedNVEmbed's own tables, with the adapters added to it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, SplitLinear):
        return torch.cat([_merged(part) for part in module.children()])
    return _merged(module) if leaf == "weight" else getattr(module, leaf)


def _merged(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]  # of an adapted one: the frozen one
    if hasattr(module, "get_delta_weight"):
        added: Tensor = module.get_delta_weight(_ADAPTER)  # type: ignore[operator]
        weight = weight.float() + added
    return weight.detach()
