"""AdamW, or Muon for the layers' matrices beside it. Knows no losses and no files."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model.training.states import trained_parameters

_BETAS = (0.9, 0.98)


def optimizer_of(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """name: adamw or muon."""
    parameters = trained_parameters(model)
    if name == "adamw":
        return _adamw(parameters, learning_rate, weight_decay)
    return _MuonAndAdamW(parameters, learning_rate, weight_decay)


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of the backbone's layers, its steps as large as
    AdamW's (Moonlight's factor), so that one learning rate serves both; AdamW for all else."""

    def __init__(self, parameters: dict[str, nn.Parameter], rate: float, decay: float) -> None:
        matrices = {
            name: parameter
            for name, parameter in parameters.items()
            if name.startswith("backbone.layers.") and parameter.dim() == 2
        }
        others = {name: p for name, p in parameters.items() if name not in matrices}
        super().__init__(list(parameters.values()), {"lr": rate})
        muon = torch.optim.Muon(
            matrices.values(), lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
        )
        self._parts: tuple[torch.optim.Optimizer, ...] = (_adamw(others, rate, decay), muon)
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def _adamw(parameters: dict[str, nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    """Matrices decay; norms, biases, embeddings and latents do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in parameters.items():
        plain = parameter.dim() < 2 or name.endswith(("embed_tokens.weight", "latents"))
        groups[not plain].append(parameter)
    shares: list[dict[str, Any]] = [
        {"params": some, "weight_decay": decay if decays else 0.0}
        for decays, some in groups.items()
    ]
    return torch.optim.AdamW(shares, lr=rate, betas=_BETAS, fused=True)
