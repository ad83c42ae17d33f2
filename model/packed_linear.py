"""Linear layers for x86 processors: the weight lies as the kernels read it, oneDNN's in bfloat16
and MKL's in float32.

A plain product lays it out anew each time, which is half of the time of a single query: with 16
rows these are 1.3 to 2 times as fast, with 1,000 rows 1.04 to 1.2 times.
"""

from __future__ import annotations

import logging
import platform
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("nv_embed.packed_linear")

_ONEDNN_ROWS, _MKL_ROWS = 512, 256
"""That the layouts are chosen for; any number of rows can be multiplied with them."""


class PackedLinear(nn.Module):
    """x·Wᵀ + b. The parameter `weight` is opaque: nothing but this forward can read it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, O]."""
        raise NotImplementedError

    def packed(self, weight: Tensor) -> nn.Parameter:
        """weight [O, I] as this layer's parameter."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        return nn.Parameter(self._laid_out(weight), requires_grad=False)

    @staticmethod
    def _laid_out(weight: Tensor) -> Tensor:
        raise NotImplementedError


class OneDNNLinear(PackedLinear):
    """In bfloat16: bit for bit the plain product."""

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
    """

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


def choose(device: torch.device, dtype: torch.dtype) -> type[PackedLinear] | None:
    """The layers that are faster than nn.Linear there, if any."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return None
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    if dtype == torch.bfloat16:
        return OneDNNLinear if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    if dtype == torch.float32 and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return MKLLinear if _mkl_takes_any_rows() else None
    return None


@lru_cache(maxsize=1)
def _mkl_takes_any_rows() -> bool:
    """Whether its layout serves other numbers of rows than it was made for: MKL's manual does not
    forbid it, and does not promise it for each processor."""
    layer = MKLLinear(nn.Linear(160, 96, bias=False, device="meta"))
    weight, every = (_waves(count, 160) for count in (96, 2 * _MKL_ROWS))
    with torch.inference_mode():
        layer.weight = layer.packed(weight)
        for rows in (1, 5, 64, _MKL_ROWS + 1, 2 * _MKL_ROWS):
            x = every[:rows]
            if not torch.allclose(layer(x), F.linear(x, weight), rtol=1e-4, atol=1e-4):
                logger.warning("MKL's packed products are wrong on this processor: not taken")
                return False
    return True


def _waves(rows: int, columns: int) -> Tensor:
    """Float32 numbers [rows, columns] that differ, and nobody's random state touched."""
    places = torch.arange(rows * columns, dtype=torch.float32, device="cpu")
    return places.mul_(0.7).sin_().view(rows, columns)


def replace_linears(module: nn.Module, kind: type[PackedLinear]) -> None:
    """Put a `kind` in the place of each nn.Linear below `module`, weights not yet set."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # bitsandbytes' layer is one, too
                setattr(parent, name, kind(child))
