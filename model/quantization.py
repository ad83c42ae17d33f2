"""8-bit weights for the backbone's linear layers.

`int8` is bitsandbytes' LLM.int8 (arXiv 2208.07339), row-wise weights, on CUDA and CPU. It halves
the weights' memory against 16 bit; it is not faster.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import UnsupportedError

QUANTIZATIONS = ("none", "int8")
_CHUNK = 1 << 20  # weights that are quantized at a time
OUTLIER_THRESHOLD = 6.0
"""Columns of activations beyond it are multiplied in 16 bit: the paper's value."""


def check(quantization: str) -> None:
    """Raise UnsupportedError when `quantization` cannot be had here."""
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise UnsupportedError(f"unknown quantization {quantization!r}; known: {known}")
    if quantization == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError("int8 needs bitsandbytes: pip install bitsandbytes")


def _bitsandbytes() -> Any:
    # It logs a warning on import about optional CPU kernels for 4 bit, which we don't use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def replace_linears(module: nn.Module) -> None:
    """Put an int8 layer in the place of each nn.Linear below `module`, values not yet set."""
    linear_class = _bitsandbytes().nn.Linear8bitLt
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                layer = linear_class(
                    child.in_features,
                    child.out_features,
                    bias=child.bias is not None,
                    has_fp16_weights=False,
                    threshold=OUTLIER_THRESHOLD,
                    device=child.weight.device,
                )
                layer.weight = quantize(
                    [child.weight.detach()], child.out_features, child.weight.device
                )
                setattr(parent, name, layer)


def is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear8bitLt"


def quantize(parts: Iterable[Tensor], out_features: int, device: torch.device) -> nn.Parameter:
    """`parts` [rows, in], stacked to [out_features, in], as an int8 parameter on `device`.

    Each row has its own scale, so it goes a few rows at a time, and what it needs beside the
    result stays small.
    """
    bitsandbytes = _bitsandbytes()
    values, scales, row = torch.empty(0), torch.empty(out_features, device=device), 0
    for part in parts:
        if not row:
            values = torch.empty(out_features, part.shape[1], dtype=torch.int8, device=device)
        for chunk in torch.split(part, max(1, _CHUNK // part.shape[1])):
            half = chunk.to(device=device, dtype=torch.float16)
            rows = slice(row, row + len(chunk))
            values[rows], scales[rows], _ = bitsandbytes.functional.int8_vectorwise_quant(half)
            row = rows.stop
    assert row == out_features, (row, out_features)
    parameter: nn.Parameter = bitsandbytes.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
    )
    return parameter
