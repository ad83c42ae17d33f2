"""Official safetensors -> Embedder on a device. Fusing, folding and quantizing happen here.

One table, `tensor_table`, names every tensor of the official layout (v1 and v2: 304 of them),
its shape and the parameter that it goes to. Shards are mapped, never read whole: beside the
weights that are kept, what a few parameters take is in use at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from model import rotary
from model.backbone import MistralBackbone
from model.config import ModelConfig
from model.embedder import Embedder
from model.errors import CheckpointError
from model.files import listed
from model.fused import Fused
from model.linear import packed_linear, quantization
from model.linear.packed_linear import PackedLinear
from model.linear.quantization import ScaledLinear
from model.platform import products
from model.platform.products import Products
from model.poolers import (
    FEED_FORWARD_FACTOR,
    LatentAttention,
    fold_keys,
    fold_values,
    normed_latents,
)
from model.weights.headers import weight_files

Parameters = list[tuple[str, nn.Parameter]]
"""Parameters of Embedder by name."""

_READERS = 3
"""Threads that read and convert: one alone waits for the disk at each page."""
_LATENT = "latent_attention_model."
_CROSS = _LATENT + "cross_attend_blocks.0."
_FEED_FORWARD = _LATENT + "cross_attend_blocks.1."


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]
    rotated: bool = False
    """Wq and Wk, whose rows make the pairs that model.rotary turns."""


def tensor_table(config: ModelConfig) -> dict[str, list[Source]]:
    """Parameter of Embedder -> the checkpoint tensors that are stacked (dim 0) to make it.

    The two folded parameters of the pooler are not here: see `folded_sources`.
    """
    width, inter = config.hidden_size, config.intermediate_size
    table: dict[str, list[Source]] = {}

    def add(parameter: str, *sources: tuple[str, tuple[int, ...]] | Source) -> None:
        table[parameter] = [s if isinstance(s, Source) else Source(*s) for s in sources]

    add(
        "backbone.embed_tokens.weight",
        ("embedding_model.embed_tokens.weight", (config.vocab_size, width)),
    )
    for index in range(config.num_hidden_layers):
        ours = f"backbone.layers.{index}."
        theirs = f"embedding_model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            add(f"{ours}{norm}.weight", (f"{theirs}{norm}.weight", (width,)))
        q = Source(theirs + "self_attn.q_proj.weight", (config.q_size, width), rotated=True)
        k = Source(theirs + "self_attn.k_proj.weight", (config.kv_size, width), rotated=True)
        v = (theirs + "self_attn.v_proj.weight", (config.kv_size, width))
        if index < config.num_hidden_layers - 1:
            add(ours + "self_attn.qkv_proj.weight", q, k, v)
        else:
            add(ours + "self_attn.q_proj.weight", q)
            add(ours + "self_attn.kv_proj.weight", k, v)
        add(
            ours + "self_attn.o_proj.weight",
            (theirs + "self_attn.o_proj.weight", (width, config.q_size)),
        )
        add(
            ours + "mlp.gate_up_proj.weight",
            (theirs + "mlp.gate_proj.weight", (inter, width)),
            (theirs + "mlp.up_proj.weight", (inter, width)),
        )
        add(
            ours + "mlp.down_proj.weight",
            (theirs + "mlp.down_proj.weight", (width, inter)),
        )
    add("backbone.norm.weight", ("embedding_model.norm.weight", (width,)))

    inner = FEED_FORWARD_FACTOR * width
    for ours, theirs, shape in (
        ("norm.weight", _CROSS + "norm.weight", (width,)),
        ("norm.bias", _CROSS + "norm.bias", (width,)),
        ("feed_forward.norm.weight", _FEED_FORWARD + "norm.weight", (width,)),
        ("feed_forward.norm.bias", _FEED_FORWARD + "norm.bias", (width,)),
        ("feed_forward.up_proj.weight", _FEED_FORWARD + "fn.net.0.weight", (2 * inner, width)),
        ("feed_forward.up_proj.bias", _FEED_FORWARD + "fn.net.0.bias", (2 * inner,)),
        ("feed_forward.down_proj.weight", _FEED_FORWARD + "fn.net.2.weight", (width, inner)),
        ("feed_forward.down_proj.bias", _FEED_FORWARD + "fn.net.2.bias", (width,)),
    ):
        add("pooler." + ours, (theirs, shape))
    return table


def folded_sources(config: ModelConfig) -> dict[str, Source]:
    """Parameter of the plain LatentAttention -> the tensor that only the fold reads."""
    width, inner = config.hidden_size, config.num_cross_heads * config.cross_dim_head
    return {
        "latents": Source(_LATENT + "latents", (config.num_latents, width)),
        "norm_context.weight": Source(_CROSS + "norm_context.weight", (width,)),
        "norm_context.bias": Source(_CROSS + "norm_context.bias", (width,)),
        "to_q.weight": Source(_CROSS + "fn.to_q.weight", (inner, width)),
        "to_kv.weight": Source(_CROSS + "fn.to_kv.weight", (2 * inner, width)),  # keys, values
        "to_out.weight": Source(_CROSS + "fn.to_out.weight", (width, inner)),
    }


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that an official checkpoint of this config holds: name -> shape."""
    sources = [s for stack in tensor_table(config).values() for s in stack]
    sources += folded_sources(config).values()
    return {source.name: source.shape for source in sources}


class Checkpoint:
    """The mapped shards of one folder: names, shapes, and rows of tensors on demand."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for weights in weight_files(folder):
            try:
                shard = safe_open(str(weights.path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{weights.path} cannot be read: {error}") from error
            self._files |= dict.fromkeys(weights.tensors, shard)
            self._shapes |= {name: tensor.shape for name, tensor in weights.tensors.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def check(self, config: ModelConfig) -> None:
        """Raise CheckpointError naming what is missing, surplus or of another shape."""
        check_shapes(expected_shapes(config), self.shapes(), "an NV-Embed")

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor, on the host, in the checkpoint's dtype.

        Raises CheckpointError when one of their numbers is NaN or infinity."""
        if start == 0 and stop is None:
            return _finite(name, self._files[name].get_tensor(name))
        return _finite(name, self._files[name].get_slice(name)[start:stop])

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """As `rows`."""
        return _finite(name, self._files[name].get_slice(name)[:, start:stop])


def _finite(name: str, values: Tensor) -> Tensor:
    """`values`, of which none is NaN or infinity (either end of their range would be, too)."""
    if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
        raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged")
    return values


def check_shapes(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], kind: str
) -> None:
    """Raise CheckpointError naming what is missing, surplus or of another shape."""
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing: {listed(missing)}")
    if surplus := found.keys() - expected.keys():
        problems.append(f"surplus: {listed(surplus)}")
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ][:10]
    if problems:
        raise CheckpointError(
            f"the tensors are not those of {kind} of this config: " + "; ".join(problems)
        )


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str = "none",
    layers: Products | None = None,
    fused: Fused | None = None,
) -> Embedder:
    """Load a checkpoint folder for inference.

    layers: those of `products.choose` for the same device, dtype and quantization, by default
    what it chooses. fused: the kernels between them, on a GPU; None: torch's own operations.
    Raises CheckpointError when the tensors are not exactly those of `config`, UnsupportedError
    when `quantize` cannot be had.
    """
    layers = layers or products.choose(device, dtype, quantize, config.widest_product)
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    model = empty_model(config, quantize=quantize, eight_bit=layers.eight_bit)
    _suit(model, model.backbone, device, layers)
    if fused is not None:
        model.backbone.use(fused)
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
                    _set(model, name, parameter)
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
    """The served module on the meta device: shapes without memory."""
    with torch.device("meta"):
        model = Embedder(config)
        if dtype is not None:
            model.to(dtype)
        if quantize != "none":
            quantization.replace_linears(model.backbone, quantize, eight_bit)
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
    read = _reader(checkpoint, config, model.backbone)

    def quantized(name: str, layer: nn.Module, sources: list[Source]) -> Parameters:
        owner = name.rpartition(".")[0]
        parts = map(read, sources)
        rows = sum(source.shape[0] for source in sources)
        parameters = quantization.parameters_of(layer, parts, rows, device)
        return [(f"{owner}.{leaf}", parameter) for leaf, parameter in parameters]

    def plain(name: str, sources: list[Source]) -> Parameters:
        return [(name, _laid_out(model, name, _stack(read, sources, device, dtype)))]

    def folded() -> Parameters:
        to_latents, from_latents = _fold(checkpoint, config, device, dtype)
        folds = {"to_latents": to_latents, "from_latents": from_latents}
        names = {f"pooler.{part}.weight": values for part, values in folds.items()}
        return [(name, _laid_out(model, name, values)) for name, values in names.items()]

    pieces = [_Piece(_count(folded_sources(config).values()), folded)]
    for name, sources in tensor_table(config).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        if quantization.is_quantized(layer):
            load = partial(quantized, name, layer, sources)
        else:
            load = partial(plain, name, sources)
        pieces.append(_Piece(_count(sources), load))
    return pieces


def _suit(
    module: nn.Module, backbone: MistralBackbone, device: torch.device, layers: Products
) -> None:
    """Give `module`, values not yet set, the layouts that are fastest there."""
    backbone.rotary = rotary.fastest(device)
    if issubclass(layers.linear, PackedLinear):
        packed_linear.replace_linears(module, layers.linear)


def _reader(
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


def _laid_out(module: nn.Module, name: str, values: Tensor) -> nn.Parameter:
    """`values` as the parameter `name` of `module`."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner)
    if leaf == "weight" and isinstance(layer, PackedLinear):
        return layer.packed(values)
    return nn.Parameter(values, requires_grad=False)


def _count(sources: Iterable[Source]) -> int:
    return sum(math.prod(source.shape) for source in sources)


def _stack(
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


def load_backbone(
    folder: Path,
    config: ModelConfig,
    *,
    depth: int,
    device: torch.device,
    dtype: torch.dtype,
    layers: Products,
) -> tuple[MistralBackbone, dict[str, Tensor]]:
    """The first `depth` layers and the final norm, of the products that serve; and the same tensors
    as they are on disk, in the names of transformers' MistralModel, for a referee."""
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    config = replace(config, num_hidden_layers=depth)
    with torch.device("meta"):
        backbone = MistralBackbone(config)
    _suit(backbone, backbone, device, layers)
    read = _reader(checkpoint, config, backbone)
    theirs = {}
    for parameter, sources in tensor_table(config).items():
        owner, _, name = parameter.partition(".")
        if owner == "backbone":
            values = _stack(read, sources, device, dtype)
            _set(backbone, name, _laid_out(backbone, name, values))
            for source in sources:
                tensor = checkpoint.rows(source.name)
                theirs[source.name.removeprefix("embedding_model.")] = tensor
    return backbone.eval(), theirs


def load_plain_pooler(
    folder: Path, config: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> LatentAttention:
    """The unfolded pooler, the referee of the folded one."""
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    with torch.device("meta"):
        pooler = LatentAttention(config)
    names = {ours: source.name for ours, source in folded_sources(config).items()}
    for parameter, sources in tensor_table(config).items():
        if parameter.startswith("pooler."):
            names[parameter.removeprefix("pooler.")] = sources[0].name
    for parameter, name in names.items():
        tensor = checkpoint.rows(name).to(device).to(dtype, copy=True)
        _set(pooler, parameter, nn.Parameter(tensor, requires_grad=False))
    return pooler.eval()


def _set(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    shape = parameter.shape
    assert parameter.is_mkldnn or getattr(parent, leaf).shape == shape, (name, shape)
    setattr(parent, leaf, parameter)
