"""Linear layers for CPUs whose weight lies as the kernels of oneDNN or MKL read it.

A plain product lays it out anew each time, which is half of the time of a single query: with 16
rows these are 1.3 to 2 times as fast, with 1,000 rows 1.04 to 1.2 times. They call operations that
are private to torch, so only model.platform.products takes them, and only where they prove right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ONEDNN_ROWS, _MKL_ROWS = 512, 256
"""That the layouts are chosen for; any number of rows can be multiplied with them."""


class PackedLinear(nn.Module):
    """x·Wᵀ + b. The parameter `weight` is opaque: nothing but this forward can read it."""

    compiles_rows: bool
    """Whether the kernels keep code and memory for each number of rows that they meet."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, O]."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)  # a module's own looks for hooks first: a twentieth of a lone text

    def packed(self, weight: Tensor) -> nn.Parameter:
        """weight [O, I] as this layer's parameter."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        return nn.Parameter(self._laid_out(weight), requires_grad=False)

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        raise NotImplementedError


class OneDNNLinear(PackedLinear):
    """In float32 and in bfloat16, where it is bit for bit the plain product."""

    compiles_rows = True

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, _ONEDNN_ROWS)  # type: ignore[no-any-return]


class MKLLinear(PackedLinear):
    """In float32. MKL lays a weight out for a number of threads: the number that it is used with.

    torch's operation wants the plain weight, too, for calls with other rows than it was told to
    expect. It is told what it gets, so the plain weight is a shape without memory.

    Any number of rows can be multiplied with a layout: MKL's manual does not forbid it, and does
    not promise it for each processor. On its kernels for processors that are not Intel's the
    layout holds 128 outputs more than there are: 1.25 times the memory at a width of 512.
    """

    compiles_rows = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        nothing = torch.full((1,), torch.nan, dtype=torch.float32, device="cpu")
        self._plain = nothing.expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 2, x.shape  # or it would take the shape for the weight
        out: Tensor = torch.ops.mkl._mkl_linear(x, self.weight, self._plain, self.bias, len(x))
        return out

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        return torch.ops.mkl._mkl_reorder_linear_weight(weight, _MKL_ROWS)  # type: ignore[no-any-return]


def replace_linears(module: nn.Module, kind: type[PackedLinear]) -> None:
    """Put a `kind` in the place of each nn.Linear below `module`, weights not yet set."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # bitsandbytes' layer is one, too
                setattr(parent, name, kind(child))
