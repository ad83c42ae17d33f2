"""A checkpoint -> Embedder on a device. Fusing, folding and quantizing happen here.

Which tensor goes where stands in `model.weights.names`. Shards are mapped, never read whole: beside
the weights that are kept, what a few parameters take is in use at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import rotary
from model.backbone import MLP, MistralBackbone
from model.config import ModelConfig
from model.embedder import Embedder
from model.linear import packed_linear, quantization
from model.linear.packed_linear import MKLLinear, PackedLinear
from model.linear.quantization import ScaledLinear
from model.operations import InPlace, OnCpu, Operations
from model.platform import products
from model.platform.products import Products
from model.poolers import fold_keys, fold_values, normed_latents
from model.weights.checkpoint import Checkpoint
from model.weights.names import Source, folded_sources, tensor_table

Parameters = list[tuple[str, nn.Parameter]]
"""Parameters of Embedder by name."""

_READERS = 3
"""Threads that read and convert: one alone waits for the disk at each page."""


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str = "none",
    layers: Products | None = None,
    operations: Operations | None = None,
) -> Embedder:
    """Load a checkpoint folder for inference.

    layers: those of `products.choose` for the same device, dtype and quantization, by default
    what it chooses. operations: what runs between them, by default what suits the device.
    Raises CheckpointError when the tensors are not exactly those of `config`, UnsupportedError
    when `quantize` cannot be had.
    """
    layers = layers or products.choose(device, dtype, quantize, config.widest_product)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    model = empty_model(config, quantize=quantize, eight_bit=layers.eight_bit)
    suit(model, model.backbone, device, layers, operations)
    pieces = _pieces(checkpoint, config, model, device, dtype)
    total = sum(piece.weights for piece in pieces)
    with (
        tqdm(desc="Loading", total=total, unit=" weights", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(
            _READERS, "load", torch.set_num_threads, (torch.get_num_threads(),)
        ) as readers,
    ):
        running = {readers.submit(piece.load): piece for piece in pieces}
        try:
            for done in as_completed(running):
                for name, parameter in done.result():
                    put(model, name, parameter)
                bar.update(running[done].weights)
        finally:
            readers.shutdown(cancel_futures=True)
    _at_hand(model)
    return model


def _at_hand(model: nn.Module) -> None:
    """Put parameters and submodules where Python looks first. A module finds them by a detour, a
    hundred times in a forward: 6 % of a lone text's time with the small model. Setting one anew
    is still right; nothing may move a loaded model to another device or dtype."""
    for module in model.modules():
        module.__dict__.update(module._parameters)
        module.__dict__.update(module._modules)


def empty_model(
    config: ModelConfig,
    *,
    quantize: str = "none",
    dtype: torch.dtype | None = None,
    eight_bit: type[ScaledLinear] | None = None,
) -> Embedder:
    """The served module on the meta device, as on a GPU: shapes without memory."""
    with torch.device("meta"):
        model = Embedder(config)
        if dtype is not None:
            model.to(dtype)
        if quantize != "none":
            quantization.replace_linears(model.backbone, quantize, eight_bit)
    model.backbone.use(InPlace())
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is loaded in one go: some tensors of the checkpoint to some parameters of the model."""

    weights: int  # numbers on disk
    load: Callable[[], Parameters]


def _pieces(
    checkpoint: Checkpoint,
    config: ModelConfig,
    model: Embedder,
    device: torch.device,
    dtype: torch.dtype,
) -> list[_Piece]:
    """The fold first: it computes while the others read."""
    read = reader_of(checkpoint, config, model.backbone)

    def quantized(name: str, layer: nn.Module, sources: list[Source]) -> Parameters:
        owner = name.rpartition(".")[0]
        parts = map(read, sources)
        rows = sum(source.shape[0] for source in sources)
        parameters = quantization.parameters_of(layer, parts, rows, device)
        return [(f"{owner}.{leaf}", parameter) for leaf, parameter in parameters]

    def plain(name: str, sources: list[Source]) -> Parameters:
        return [(name, laid_out(model, name, stacked(read, sources, device, dtype)))]

    def folded() -> Parameters:
        to_latents, from_latents = _fold(checkpoint, config, device, dtype)
        folds = {"to_latents": to_latents, "from_latents": from_latents}
        names = {f"pooler.{part}.weight": values for part, values in folds.items()}
        return [(name, laid_out(model, name, values)) for name, values in names.items()]

    pieces = []
    if fold := folded_sources(config):
        pieces.append(_Piece(_count(fold.values()), folded))
    for name, sources in tensor_table(config).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if quantization.is_quantized(layer):
            load = partial(quantized, name, layer, sources)
        else:
            load = partial(plain, name, sources)
        pieces.append(_Piece(_count(sources), load))
    return pieces


def suit(
    module: nn.Module,
    backbone: MistralBackbone,
    device: torch.device,
    layers: Products,
    operations: Operations | None = None,
) -> None:
    """Give `module`, values not yet set, the layouts and operations that are fastest there."""
    if issubclass(layers.linear, PackedLinear):
        packed_linear.replace_linears(module, layers.linear)
    if operations is None:
        mlps = (part for part in backbone.modules() if isinstance(part, MLP))
        by_mkl = any(isinstance(mlp.gate_up_proj, MKLLinear) for mlp in mlps)
        operations = OnCpu(mlp_by_rows=by_mkl) if device.type == "cpu" else InPlace()
    backbone.use(operations)


def reader_of(
    checkpoint: Checkpoint, config: ModelConfig, backbone: MistralBackbone
) -> Callable[[Source], Tensor]:
    """Reads a tensor with its rows in the order that `backbone` wants."""
    neighbours = backbone.rotary is rotary.NeighboursRotary

    def read(source: Source) -> Tensor:
        rows = checkpoint.rows(source.name)
        return (
            rotary.as_neighbours(rows, config.head_dim) if neighbours and source.rotated else rows
        )

    return read


def laid_out(module: nn.Module, name: str, values: Tensor) -> nn.Parameter:
    """`values` as the parameter `name` of `module`."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    if leaf == "weight" and isinstance(layer, PackedLinear):
        return layer.packed(values)
    return nn.Parameter(values, requires_grad=False)


def _count(sources: Iterable[Source]) -> int:
    return sum(math.prod(source.shape) for source in sources)


def stacked(
    read: Callable[[Source], Tensor],
    sources: list[Source],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """`sources` stacked along dim 0. Each goes to the device as it is and is converted there: torch
    would do that on the host, which has other things to do."""
    rows = sum(source.shape[0] for source in sources)
    stacked = torch.empty(rows, *sources[0].shape[1:], device=device, dtype=dtype)
    start = 0
    for source in sources:
        stacked[start : start + source.shape[0]].copy_(read(source).to(device))
        start += source.shape[0]
    return stacked


def _fold(
    checkpoint: Checkpoint, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`to_latents` [H·L, D] and `from_latents` [D, H·L], folded in float32 head by head."""
    names = {ours: source.name for ours, source in folded_sources(config).items()}
    heads, width = config.num_cross_heads, config.hidden_size
    latents, cross = config.num_latents, config.cross_dim_head
    to_latents = torch.empty(heads * latents, width, device=device, dtype=dtype)
    from_latents = torch.empty(width, heads * latents, device=device, dtype=dtype)
    context = normed_latents(
        *(
            checkpoint.rows(names[part]).to(device)
            for part in ("latents", "norm_context.weight", "norm_context.bias")
        )
    )
    for head in range(heads):
        ours = slice(head * latents, (head + 1) * latents)
        start, stop = head * cross, (head + 1) * cross
        to_q = checkpoint.rows(names["to_q.weight"], start, stop)
        to_k = checkpoint.rows(names["to_kv.weight"], start, stop)
        value_at = heads * cross
        to_v = checkpoint.rows(names["to_kv.weight"], value_at + start, value_at + stop)
        to_out = checkpoint.columns(names["to_out.weight"], start, stop)
        to_latents[ours] = fold_keys(context, to_k.to(device), to_q.to(device)).to(dtype)
        from_latents[:, ours] = fold_values(context, to_v.to(device), to_out.to(device)).to(dtype)
    return to_latents, from_latents


def put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    shape = parameter.shape
    assert parameter.is_mkldnn or getattr(parent, leaf).shape == shape, (name, shape)
    setattr(parent, leaf, parameter)
