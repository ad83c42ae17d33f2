"""Linear layers for bfloat16 on a CPU: the weight lies as oneDNN's kernels read it.

A plain product lays it out anew each time, which is half of the time of a single query: with 16
rows 1.3 to 2 times as fast, with 1,000 up to 1.2 times, bit for bit the same. In float32 nothing
is gained: MKL's products are as fast.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor, nn

_ROWS = 512
"""That the layout is chosen for; any number of rows can be multiplied with it."""


def is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to take these layers there."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class PackedLinear(nn.Module):
    """x·Wᵀ + b. The parameter `weight` is opaque: nothing but this forward can read it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


def replace_linears(module: nn.Module) -> None:
    """Put a PackedLinear in the place of each nn.Linear below `module`, weights not yet set."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # bitsandbytes' layer is one, too
                setattr(parent, name, PackedLinear(child))


def packed(weight: Tensor) -> nn.Parameter:
    """weight [O, I] as a PackedLinear's parameter."""
    return nn.Parameter(torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS), requires_grad=False)
