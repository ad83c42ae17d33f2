"""The passes between a layer's matrix products, compiled: norms, rotations, SiLU.

Uncompiled they are a row of operations, each over all rows in memory and back, and take more than
half of a step on a CPU. Attention stays as it is: its shapes are other ones in every step. Needs a
C++ compiler on a CPU; torch names it when there is none. Compiling takes half a minute.

Plain functions of tensors are compiled, once for all layers: of modules torch would compile each
one anew, and after eight of them none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear.quantization import ScaledRows
from model.operations import Differentiable, Product
from model.rotary import HalvesRotary
from model.training.network import TrainedNVEmbed


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """When it is needed: torch's compiler takes seconds to import."""
    return torch.compile(function, dynamic=True)


def _added_and_normed(
    residual: Tensor, update: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual = residual + update
    return residual, F.rms_norm(residual, weight.shape, weight, eps)


def _activated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class CompiledRotary(HalvesRotary):
    """The same angles; one pass to turn by them."""

    def rotate(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().rotate(x)
        return _compiled(_rotated)(x, self.cos, self.sin)  # type: ignore[no-any-return]


class Compiled(Differentiable):
    """Where there is a gradient: what runs without one is not worth the compiling."""

    rotary = CompiledRotary

    def add_norm(
        self, residual: Tensor, update: Tensor, weight: Tensor, eps: float, *, float8: bool = False
    ) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return super().add_norm(residual, update, weight, eps)
        return _compiled(_added_and_normed)(residual, update, weight, eps)  # type: ignore[no-any-return]

    def mlp(
        self, x: Tensor | ScaledRows, gate_up: Product, down: Product, *, float8: bool = False
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().mlp(x, gate_up, down)
        return down(_compiled(_activated)(gate_up(x)))


def compile_parts(model: TrainedNVEmbed) -> None:
    """In place; parameters and their names stay."""
    _keep_apart(torch.backends.cpu.get_cpu_capability())
    model.backbone.use(Compiled())


def _keep_apart(capability: str) -> None:
    """What torch compiled for other vector units on this disk is wrong here, and its key is equal.

    Its cache takes a pass written in steps of 16 floats for one in steps of 8, without a word.
    """
    config = torch.compiler.config
    if capability not in config.cache_key_tag:
        config.cache_key_tag += capability
