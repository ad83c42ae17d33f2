"""A smaller checkpoint out of a larger one: whole layers, kv heads and MLP neurons are left out.

What goes is what moves the hidden states of given texts least, measured once, on the whole model:
of layers by the cosine of what comes in to what goes out (ShortGPT, Men et al. 2024), of kv heads
(with their query heads) and neurons by the energy of what they add to the residual (Minitron,
Muralidharan et al. 2024). The width stays, so vectors have the same axes, and what was pruned is
distilled back to the vectors of what it was (model/training/README.md). For every family; the
last layer's rows are those that are pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.backbone import Layer, select_rows
from model.config import ModelConfig
from model.errors import CheckpointError, UnsupportedError
from model.files import read_json
from model.packing import pack
from model.tokenizer import NVEmbedTokenizer, Truncation
from model.training.attention import grouped_products
from model.training.examples import DataError
from model.training.export import copy_beside, tell_family, write_checkpoint, write_papers
from model.training.network import TrainedNVEmbed, load_trained
from model.weights.checkpoint import Checkpoint
from model.weights.names import expected_shapes

_TEXTS_AT_A_TIME = 32


@dataclass(frozen=True, slots=True)
class Sizes:
    """What shall be left; None: as many as there are."""

    layers: int | None = None
    kv_heads: int | None = None
    intermediate_size: int | None = None

    def of(self, config: ModelConfig) -> ModelConfig:
        """The config with these sizes. Raises UnsupportedError where there are not so many."""
        before = (config.num_hidden_layers, config.num_kv_heads, config.intermediate_size)
        wanted = (self.layers, self.kv_heads, self.intermediate_size)
        after = []
        for name, has, want in zip(
            ("layers", "kv-heads", "intermediate-size"), before, wanted, strict=True
        ):
            if want is not None and not 1 <= want <= has:
                raise UnsupportedError(f"--{name} is {want}, and the model has {has}")
            after.append(want or has)
        if tuple(after) == before:
            raise UnsupportedError("nothing to leave out: name fewer layers, kv heads or neurons")
        return replace(
            config,
            num_hidden_layers=after[0],
            num_kv_heads=after[1],
            num_heads=config.num_heads // config.num_kv_heads * after[1],
            intermediate_size=after[2],
        )


class Importance:
    """How much each part moves the hidden states, summed over rows.

    layers [layers] (1 - cosine), kv_heads [layers, K] and neurons [layers, I] (squared length).
    """

    def __init__(self, model: TrainedNVEmbed) -> None:
        config = model.config
        count = config.num_hidden_layers
        self.layers = torch.zeros(count, dtype=torch.float64)
        self.kv_heads = torch.zeros(count, config.num_kv_heads, dtype=torch.float64)
        self.neurons = torch.zeros(count, config.intermediate_size, dtype=torch.float64)
        for index, layer in enumerate(model.backbone.layers):
            assert isinstance(layer, Layer)
            layer.register_forward_hook(self._of_layer(index))
            layer.self_attn.o_proj.register_forward_pre_hook(self._of_heads(index))
            layer.mlp.down_proj.register_forward_pre_hook(self._of_neurons(index))

    def _of_layer(self, index: int) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
            residual, update, _rotary, batch, _attend = given
            before = residual if update is None else residual + update
            after = out[0] + out[1]
            before = before if len(before) == len(after) else select_rows(before, batch)
            cosines = torch.cosine_similarity(before, after, dim=-1)
            self.layers[index] += (1 - cosines).sum()

        return hook

    def _of_heads(self, index: int) -> Any:
        def hook(product: nn.Linear, given: tuple[Tensor]) -> None:
            (rows,) = given
            for head, (part, weight) in enumerate(
                zip(
                    rows.chunk(self.kv_heads.shape[1], dim=1),
                    product.weight.chunk(self.kv_heads.shape[1], dim=1),
                    strict=True,
                )
            ):
                self.kv_heads[index, head] += (part @ weight.T).square().sum()

        return hook

    def _of_neurons(self, index: int) -> Any:
        def hook(product: nn.Linear, given: tuple[Tensor]) -> None:
            self.neurons[index] += given[0].square().sum(0) * product.weight.square().sum(0)

        return hook


@dataclass(frozen=True, slots=True)
class Kept:
    """The parts that stay, by their numbers in the whole model, in its order."""

    layers: list[int]
    kv_heads: list[list[int]]  # of each layer that stays
    neurons: list[list[int]]

    @classmethod
    def of(cls, importance: Importance, config: ModelConfig) -> Kept:
        """The most important, as many as `config` has."""
        layers = _largest(importance.layers, config.num_hidden_layers)
        return cls(
            layers,
            [_largest(importance.kv_heads[layer], config.num_kv_heads) for layer in layers],
            [_largest(importance.neurons[layer], config.intermediate_size) for layer in layers],
        )


def _largest(values: Tensor, count: int) -> list[int]:
    order = torch.sort(values, descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


@torch.no_grad()
def measure(
    model: TrainedNVEmbed, tokenizer: NVEmbedTokenizer, texts: Sequence[str], max_tokens: int
) -> tuple[Importance, Tensor]:
    """The importance of the model's parts to the texts, and their vectors [N, D]."""
    importance = Importance(model)
    return importance, embed(model, tokenizer, texts, max_tokens)


@torch.no_grad()
def embed(
    model: TrainedNVEmbed, tokenizer: NVEmbedTokenizer, texts: Sequence[str], max_tokens: int
) -> Tensor:
    """Vectors [N, D] of the texts as passages, each cut at max_tokens."""
    device = next(model.parameters()).device
    prompt = model.config.family.prompt("passage")
    rows = []
    for start in range(0, len(texts), _TEXTS_AT_A_TIME):
        encodings = [
            tokenizer.encode(text, prompt, max_tokens=max_tokens, truncate=Truncation.END)
            for text in texts[start : start + _TEXTS_AT_A_TIME]
        ]
        order = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]))
        batch = pack([encodings[i] for i in order], device, pooled=model.config.family.pooled)
        places = torch.argsort(torch.tensor(order)).to(device)
        rows.append(model(batch, grouped_products).index_select(0, places))
    return torch.cat(rows)


def pruned(tensors: dict[str, Tensor], config: ModelConfig, kept: Kept) -> dict[str, Tensor]:
    """The tensors of the whole model, which `config` is of -> those of the smaller one."""
    before = f"{config.family.prefix}layers."
    found = {name: value for name, value in tensors.items() if not name.startswith(before)}
    queries = config.num_heads // config.num_kv_heads * config.head_dim
    parts = zip(kept.layers, kept.kv_heads, kept.neurons, strict=True)
    for place, (layer, kv_heads, neurons) in enumerate(parts):
        of_queries, of_keys = _rows(kv_heads, queries), _rows(kv_heads, config.head_dim)
        for name, value in tensors.items():
            if not name.startswith(f"{before}{layer}."):
                continue
            part = name.removeprefix(f"{before}{layer}.")
            kind = part.split(".")[-2]
            if kind == "q_proj":
                value = value[of_queries]
            elif kind in ("k_proj", "v_proj"):
                value = value[of_keys]
            elif kind == "o_proj":
                value = value[:, of_queries]
            elif kind in ("gate_proj", "up_proj"):
                value = value[neurons]
            elif kind == "down_proj":
                value = value[:, neurons]
            found[f"{before}{place}.{part}"] = value.contiguous()
    return found


def _rows(heads: Sequence[int], size: int) -> list[int]:
    return [head * size + row for head in heads for row in range(size)]


def prune(
    source: Path,
    out: Path,
    texts: Sequence[str],
    sizes: Sizes,
    *,
    family: str = "auto",
    max_tokens: int = 192,
    device: torch.device | None = None,
) -> tuple[Kept, float]:
    """Write the smaller checkpoint, in the layout and dtype of `source`.

    Returns what stays, and the mean cosine of the texts' vectors, before and after.
    Raises CheckpointError, UnsupportedError, DataError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UnsupportedError(f"{out} exists: name a new folder")
    if not texts:
        raise DataError("no texts to measure by")
    where = device or torch.device("cpu")
    config = ModelConfig.from_dir(source, family)
    smaller = sizes.of(config)
    tokenizer = NVEmbedTokenizer.from_dir(source, config=config)
    out.mkdir(parents=True, exist_ok=True)
    model = load_trained(source, device=where, family=family)
    importance, vectors = measure(model, tokenizer, texts, max_tokens)
    kept = Kept.of(importance, smaller)
    del model
    checkpoint = Checkpoint(source)
    checkpoint.check(config)
    whole = {name: checkpoint.rows(name) for name in expected_shapes(config)}
    named = {checkpoint.before + name: x for name, x in pruned(whole, config, kept).items()}
    write_checkpoint(out, named, _settings(source, smaller), source / "tokenizer.json")
    copy_beside(source, out)
    tell_family(out, config)
    write_papers(source, out, f"Pruned to {_said(smaller)}; no training since.")
    after = embed(load_trained(out, device=where), tokenizer, texts, max_tokens)
    return kept, torch.cosine_similarity(vectors, after, dim=-1).mean().item()


def _settings(source: Path, config: ModelConfig) -> dict[str, Any]:
    """The source's config.json with the sizes of `config`."""
    raw: dict[str, Any] = read_json(source / "config.json")
    raw["_name_or_path"] = config.name or source.resolve().name
    section = config.family.section
    text = raw if section is None else raw[section]
    if isinstance(text.get("layer_types"), list) and len(set(text["layer_types"])) > 1:
        raise CheckpointError(f"{source} has layers of several kinds: they cannot be left out")
    text.pop("layer_types", None)
    text["num_hidden_layers"] = config.num_hidden_layers
    text["num_attention_heads"] = config.num_heads
    text["num_key_value_heads"] = config.num_kv_heads
    text["head_dim"] = config.head_dim  # else it would be width / heads
    text["intermediate_size"] = config.intermediate_size
    return raw


def _said(config: ModelConfig) -> str:
    return (
        f"{config.num_hidden_layers} layers, {config.num_kv_heads} kv heads and "
        f"{config.intermediate_size} MLP neurons"
    )
