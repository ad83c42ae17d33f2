"""8-bit weights for the backbone's linear layers, made while the checkpoint is loaded.

- `int8` is bitsandbytes' LLM.int8 (arXiv 2208.07339), row-wise weights, on CUDA and CPU. It halves
  the weights' memory against 16 bit; it is not faster.
- `int8-dynamic` multiplies int8 by int8 on the CPU: a scale for each output of a weight and, found
  anew in each forward, for each row of activations. Smaller, and faster where the processor
  multiplies 8 bits: which of its layers is right and fast there, model.platform.products finds out.
- `float8` is the same in float8_e4m3fn for GPUs whose matrix units have it.

A row's scale is its own, so under the last two a text's vector does not depend on its batch-mates.
Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch import Quantization
from model.errors import UnsupportedError
from model.extras import how_to_install

QUANTIZATIONS = get_args(Quantization)
_CHUNK = 1 << 18  # weights that are quantized at a time: 1 MB of float32 stays in the cache
_GPU_CHUNK = 1 << 24  # there each piece costs a dozen launches and a wait, however small it is
OUTLIER_THRESHOLD = 6.0
"""Columns of activations beyond it are multiplied in 16 bit: the paper's value."""
_INT8_MAX, _INT7_MAX, _FLOAT8_MAX = 127.0, 63.0, 448.0
_BLOCK = 64  # rows of activations that are quantized at a time: they stay in the cache


def check(quantization: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UnsupportedError when `quantization` cannot be had on `device` in `dtype`."""
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise UnsupportedError(f"unknown quantization {quantization!r}; known: {known}")
    if quantization == "int8" and importlib.util.find_spec("bitsandbytes") is None:
        raise UnsupportedError(f"int8 needs bitsandbytes: {how_to_install('int8')}")
    if quantization == "int8-dynamic" and device.type != "cpu":
        raise UnsupportedError("int8-dynamic is for CPUs: take float8 or int8 on a GPU")
    if quantization == "float8":
        fits = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
        if not fits or dtype != torch.bfloat16:
            raise UnsupportedError(
                "float8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later, and "
                f"bfloat16; this is {str(dtype).removeprefix('torch.')} on {device}"
            )


class ScaledRows(NamedTuple):
    """Rows in 8 bits: about values * scales."""

    values: Tensor  # [T, I]
    scales: Tensor  # [T, 1]

    def select(self, rows: Tensor | None) -> ScaledRows:
        """Those of `rows` alone, None: all. As bytes, which every device can gather."""
        if rows is None:
            return self
        values = self.values.view(torch.uint8).index_select(0, rows).view(self.values.dtype)
        return ScaledRows(values, self.scales.index_select(0, rows))


class ScaledLinear(nn.Module):
    """A linear layer whose weight [I, O] is 8 bit, with a scale for each output [O]; no bias."""

    store: torch.dtype
    most: float  # the largest value of a weight
    activations_most: float
    compiles_rows = False
    """Whether the kernels keep code and memory for each number of rows that they meet."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        weight = torch.empty(out_features, in_features, dtype=self.store)
        self.weight = nn.Parameter(weight.T, requires_grad=False)
        scales = torch.empty(out_features, dtype=torch.float32)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> [T, O] in x's dtype."""
        values, scales = quantize_rows(x, self.activations_most)
        return self._product(values, scales, x.dtype)

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 rows of a weight [O, I] -> (8-bit values [O, I], scales [O, 1])."""
        return quantize_rows(weight, self.most)

    def _product(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    @classmethod
    def laid_out(cls, values: Tensor) -> Tensor:
        """values [O, I] in the layout that `_product` wants, [I, O]."""
        return values.T


class PlainInt8Linear(ScaledLinear):
    """Products of the 8-bit values in float32: right on every processor, and slow."""

    store = torch.int8
    most = activations_most = _INT8_MAX

    def _product(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        outputs = torch.split(self.weight, max(1, _CHUNK // self.in_features), dim=1)
        wide = values.float()
        products = torch.cat([wide @ weight.float() for weight in outputs], dim=1)
        return products.mul_(self.scales).mul_(scales).to(dtype)


class _OneDNNInt8Linear(ScaledLinear):
    """Products by oneDNN, whose kernel also scales the outputs; the weight lies as it wants it.

    The operation is private to torch. Which kernel it reaches, and whether sums of products are cut
    off at 16 bits there, depends on the processor and on the activations' sign.
    (`torch._int_mm` takes 1.2 to 2.3 times as long, before its int32 result has been scaled.)
    """

    store = torch.int8
    most = activations_most = _INT8_MAX
    compiles_rows = True
    zero_point = 0

    def _shifted(self, values: Tensor) -> Tensor:
        """int8 values as the kernel takes them."""
        return values

    def _product(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        if values.device.type == "meta":  # shapes and FLOPs only
            return torch._int_mm(values, self.weight).to(dtype)
        zeros = torch.zeros(self.out_features, dtype=torch.int64)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            self._shifted(values),
            1.0,
            self.zero_point,
            self.weight,
            self.scales,
            zeros,
            None,
            1.0,
            0,
            dtype,
            "none",
            [],
            "",
        )
        return out.mul_(scales)

    @classmethod
    def laid_out(cls, values: Tensor) -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(values, None)
        return packed


class SignedInt8Linear(_OneDNNInt8Linear):
    """int8 by int8: AMX has it; elsewhere on x86 it may be oneDNN's reference loop."""


class UnsignedInt8Linear(_OneDNNInt8Linear):
    """uint8 by int8 with zero at 128: what VNNI multiplies. Exact there, cut off without it."""

    zero_point = 128

    def _shifted(self, values: Tensor) -> Tensor:
        return values.view(torch.uint8).bitwise_xor_(128)  # + 128


class UnsignedInt7Linear(_OneDNNInt8Linear):
    """uint8 from 1 to 127, zero at 64: two products always fit into 16 bits, so it is exact on
    every processor. The activations have half of the steps."""

    activations_most = _INT7_MAX
    zero_point = 64

    def _shifted(self, values: Tensor) -> Tensor:
        return values.view(torch.uint8).add_(64)


class Float8Linear(ScaledLinear):
    """Products by cuBLAS or CUTLASS with a scale for each row and each column, in bfloat16."""

    store = torch.float8_e4m3fn
    most = activations_most = _FLOAT8_MAX
    fast_accumulation = True
    """Sums stay in the matrix units, whose precision is less than float32's. torch's kernels for
    scales of rows are known to be slow without."""
    to_rows: Callable[[Tensor], ScaledRows]
    """How x is quantized: as `float8_rows` does, or by a kernel of model.fused."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.to_rows = float8_rows

    def quantized(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return float8_rows(weight)

    def forward(self, x: Tensor | ScaledRows) -> Tensor:
        """x [T, I], or what `to_rows` makes of it -> [T, O] in bfloat16."""
        values, scales = x if isinstance(x, ScaledRows) else self.to_rows(x)
        return self._product(values, scales, torch.bfloat16)

    def _product(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        fast = self.fast_accumulation
        return _float8_product(values, self.weight, scales, self.scales[None], dtype, fast)


def _float8_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """a [T, I], rows one after another, times b [I, O], columns one after another, scaled by
    scale_a [T, 1] and scale_b [1, O], both float32. I and O are multiples of 16."""
    if not hasattr(F, "scaled_mm"):  # an older torch: the same under a private name
        return torch._scaled_mm(
            a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast
        )
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        a, b, scale_a, by_row, scale_b, by_row, output_dtype=dtype, use_fast_accum=fast
    )


_LAYERS: dict[str, type[ScaledLinear]] = {
    "int8-dynamic": SignedInt8Linear,
    "float8": Float8Linear,
}


def usual_layer(quantization: str) -> type[ScaledLinear] | None:
    """Its layer, where it has one of ours; on a CPU model.platform.products may take another."""
    return _LAYERS.get(quantization)


def float8_rows(x: Tensor) -> ScaledRows:
    """x [T, I] in bfloat16 or float32 -> float8 values and float32 scales, in few operations.

    Where x is in bfloat16, what is rounded to float8 is, too: that moves 9 bytes for a number in
    place of 13, and a number between two of float8's may go to the farther one, by 3 % of the step.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    # Rounded to x's dtype, so that what is multiplied back is what was divided by. That may make
    # the largest value 450, which still rounds to 448.
    scales = largest.div_(_FLOAT8_MAX).clamp_min_(torch.finfo(x.dtype).tiny)
    return ScaledRows(torch.div(x, scales).to(torch.float8_e4m3fn), scales.float())


def quantize_rows(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """x [T, I] -> (int8 values [T, I], scales [T, 1] in x's dtype): x is about values * scales."""
    # Two reductions: each is three times as fast as one of |x|, which has to be stored first.
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    # Rounded to x's dtype first, so that what is multiplied back is what was divided by. In
    # bfloat16 that may make the largest value 127.25, which still rounds to 127.
    scales = largest.div_(most).clamp_min_(torch.finfo(x.dtype).tiny)
    inverse = 1 / scales.float()
    if x.device.type != "cpu" or len(x) <= _BLOCK:
        return (x * inverse).round_().to(torch.int8), scales  # in float32 up to here
    values = torch.empty(x.shape, dtype=torch.int8)
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        values[rows] = (x[rows] * inverse[rows]).round_()
    return values, scales


def _bitsandbytes() -> Any:
    # It logs a warning on import about optional CPU kernels for 4 bit, which we don't use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def replace_linears(
    module: nn.Module, quantization: str, kind: type[ScaledLinear] | None = None
) -> None:
    """Put an 8-bit layer (a `kind`, or the usual one) in the place of each nn.Linear below
    `module`, values not yet set.

    The backbone's have no bias, and neither have these.
    """
    kind = kind or usual_layer(quantization)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, _empty_layer(child, kind))


def _empty_layer(linear: nn.Linear, kind: type[ScaledLinear] | None) -> nn.Module:
    device = linear.weight.device
    if kind is not None:
        with device:
            return kind(linear.in_features, linear.out_features)
    layer: nn.Module = _bitsandbytes().nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIER_THRESHOLD,
        device=device,
    )
    layer.weight = quantize([linear.weight.detach()], linear.out_features, device)["weight"]
    return layer


def is_quantized(module: nn.Module) -> bool:
    return isinstance(module, ScaledLinear) or type(module).__name__ == "Linear8bitLt"


def parameters_of(
    layer: nn.Module, parts: Iterable[Tensor], rows: int, device: torch.device
) -> Iterator[tuple[str, nn.Parameter]]:
    """`parts`, stacked to [rows, I], as the parameters of an 8-bit `layer` on `device`."""
    if not isinstance(layer, ScaledLinear):
        yield from quantize(parts, rows, device).items()
        return
    values = torch.empty(rows, layer.in_features, dtype=layer.store, device=device)
    scales = torch.empty(rows, device=device)
    for place, chunk in _chunks(parts, device):
        values[place], chunk_scales = layer.quantized(chunk.float())
        scales[place] = chunk_scales[:, 0]
    yield "weight", nn.Parameter(layer.laid_out(values), requires_grad=False)
    yield "scales", nn.Parameter(scales, requires_grad=False)


def _chunks(parts: Iterable[Tensor], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time, on `device`, so that what is needed beside the result stays small."""
    row = 0
    for part in parts:
        size = _CHUNK if device.type == "cpu" else _GPU_CHUNK
        for chunk in torch.split(part, max(1, size // part.shape[1])):
            yield slice(row, row + len(chunk)), chunk.to(device)
            row += len(chunk)


def quantize(
    parts: Iterable[Tensor], out_features: int, device: torch.device
) -> dict[str, nn.Parameter]:
    """`parts` [rows, I], stacked to [out_features, I], as LLM.int8's parameter on `device`."""
    bitsandbytes = _bitsandbytes()
    values, scales = torch.empty(0), torch.empty(out_features, device=device)
    for rows, chunk in _chunks(parts, device):
        if not rows.start:
            values = torch.empty(out_features, chunk.shape[1], dtype=torch.int8, device=device)
        half = chunk.to(torch.float16)
        values[rows], scales[rows], _ = bitsandbytes.functional.int8_vectorwise_quant(half)
    assert rows.stop == out_features, (rows, out_features)
    parameter: nn.Parameter = bitsandbytes.nn.Int8Params(
        values, requires_grad=False, has_fp16_weights=False, CB=values, SCB=scales
    )
    return {"weight": parameter}
