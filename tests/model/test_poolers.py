"""The pooler, plain and folded, against the published formula written out naively."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from model import poolers
from model.attention.kernels import choose_kernel
from model.batch import Encoding
from model.config import ModelConfig
from model.packing import Segments, pack
from model.poolers import segment_mean
from model.verify.parts import load_plain_pooler
from model.weights.loader import empty_model, load_model
from model.weights.names import expected_shapes
from tests.checkpoints import recipe_tensor
from tests.model.test_config import OFFICIAL

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTHS = (1, 20, 7, 7, 130)


def segments(lengths: tuple[int, ...]) -> Segments:
    bounds = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    return Segments(lengths, bounds, max(lengths))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight + bias


@cache
def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(recipe_tensor(name, shape)).double()


def published_pooler(h: Tensor, config: ModelConfig) -> Tensor:
    """One sequence, [T, D] -> [D], step by step in float64, from the checkpoint's own tensors:
    cross-attention, feed-forward, and the mean last."""

    def tensor(name: str) -> Tensor:
        full = f"latent_attention_model.{name}"
        return drawn(full, expected_shapes(config)[full])

    cross, feed = "cross_attend_blocks.0.", "cross_attend_blocks.1."
    h = h.double()
    normed = layer_norm(h, tensor(cross + "norm.weight"), tensor(cross + "norm.bias"))
    context = layer_norm(
        tensor("latents"),
        tensor(cross + "norm_context.weight"),
        tensor(cross + "norm_context.bias"),
    )
    queries = normed @ tensor(cross + "fn.to_q.weight").T
    to_k, to_v = tensor(cross + "fn.to_kv.weight").chunk(2)
    keys, values = context @ to_k.T, context @ to_v.T
    width = config.cross_dim_head
    heads = []
    for head in range(config.num_cross_heads):
        mine = slice(head * width, (head + 1) * width)
        weights = (queries[:, mine] @ keys[:, mine].T / math.sqrt(width)).softmax(-1)
        heads.append(weights @ values[:, mine])
    h = torch.cat(heads, -1) @ tensor(cross + "fn.to_out.weight").T + h

    normed = layer_norm(h, tensor(feed + "norm.weight"), tensor(feed + "norm.bias"))
    first = normed @ tensor(feed + "fn.net.0.weight").T + tensor(feed + "fn.net.0.bias")
    value, gate = first.chunk(2, -1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    h = (value * gelu) @ tensor(feed + "fn.net.2.weight").T + tensor(feed + "fn.net.2.bias") + h
    return h.mean(0)


def hidden_states(config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sum(LENGTHS), config.hidden_size, generator=generator)


@pytest.fixture(scope="module", params=["golden", "wide"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    return folder


def test_plain_and_folded_equal_the_published_formula(checkpoint: Path) -> None:
    config = ModelConfig.from_dir(checkpoint)
    h = hidden_states(config)
    expected = F.normalize(
        torch.stack([published_pooler(part, config) for part in h.split(list(LENGTHS))]), dim=-1
    ).float()
    plain = load_plain_pooler(checkpoint, config, device=CPU, dtype=torch.float32)
    folded = load_model(checkpoint, config, device=CPU, dtype=torch.float32).pooler
    for pooler in (plain, folded):
        with torch.inference_mode():
            vectors = pooler(h, segments(LENGTHS))
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(F.normalize(vectors, dim=-1), expected, rtol=0, atol=1e-5)


def test_folded_equals_plain_in_bfloat16(checkpoint: Path) -> None:
    config = ModelConfig.from_dir(checkpoint)
    h = hidden_states(config).bfloat16()
    plain = load_plain_pooler(checkpoint, config, device=CPU, dtype=torch.bfloat16)
    folded = load_model(checkpoint, config, device=CPU, dtype=torch.bfloat16).pooler
    with torch.inference_mode():
        cosines = F.cosine_similarity(plain(h, segments(LENGTHS)), folded(h, segments(LENGTHS)))
    assert cosines.min() >= 0.9999, cosines


def test_means_of_segments() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).bfloat16()
    means = segment_mean(x, segments((2, 1)))
    assert means.tolist() == [[2.0, 3.0], [5.0, 6.0]]
    assert means.dtype == torch.float32


def test_the_gpus_way_to_take_means_on_meta_and_on_values() -> None:
    meta = segment_mean(
        torch.empty(5, 8, device="meta", dtype=torch.bfloat16),
        Segments((2, 3), torch.empty(3, device="meta", dtype=torch.int32), 3),
    )
    assert (meta.shape, meta.dtype) == ((2, 8), torch.float32)
    x, lengths = torch.randn(sum(LENGTHS), 4), segments(LENGTHS).cu_seqlens.diff()
    by_reduce = torch.segment_reduce(x, "mean", lengths=lengths, axis=0, unsafe=True)
    torch.testing.assert_close(by_reduce, segment_mean(x, segments(LENGTHS)))


# -- memory ----------------------------------------------------------------------------------


class MetaMemory(TorchDispatchMode):
    """Counts the bytes of meta tensors' storages as an allocator would."""

    def __init__(self) -> None:
        super().__init__()
        self.used = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        tree_map(self._book, out)
        return out

    def _book(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            return
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self._live.add(key)
            self.used += size
            self.peak = max(self.peak, self.used)
            weakref.finalize(storage, self._give_back, key, size)

    def _give_back(self, key: int, size: int) -> None:
        self._live.discard(key)
        self.used -= size


def peak(rows: int) -> tuple[float, float]:
    """GB that one text takes at the official size in bfloat16, as on a GPU: (in the backbone, in
    all). Each layer has the same peak: two tell it."""
    config = replace(ModelConfig.from_dict(OFFICIAL), num_hidden_layers=2)
    model = empty_model(config, dtype=torch.bfloat16)
    _, attend = choose_kernel("auto", META, torch.bfloat16)
    batch = pack([Encoding(np.ones(rows, dtype=np.int32))], META)
    with torch.inference_mode(), MetaMemory() as memory:
        model.backbone(batch, attend)
        backbone = memory.peak
        model(batch, attend)
    return backbone / 1e9, memory.peak / 1e9


@pytest.mark.parametrize("rows", [8_192, 32_768])
def test_the_pooler_does_not_set_the_peak(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, whole = peak(rows)
    assert whole == backbone
    monkeypatch.setattr(poolers, "_ROWS_AT_A_TIME", 1 << 20)
    assert peak(rows)[1] > 1.1 * backbone  # so the counting sees it


@pytest.mark.parametrize("rows_at_a_time", [1, 7, 32, 100, 164, 1000])
def test_pieces_change_nothing(
    golden_checkpoint: Path, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences that begin, end and lie whole within a piece, and filler behind the last one."""
    config = ModelConfig.from_dir(golden_checkpoint)
    h = hidden_states(config)
    filled = torch.cat([h, h[-1:].expand(11, -1)])
    expected = F.normalize(
        torch.stack([published_pooler(part, config) for part in h.split(list(LENGTHS))]), dim=-1
    ).float()
    both = (
        load_plain_pooler(
            golden_checkpoint, config, device=CPU, dtype=torch.float32, in_pieces=True
        ),
        load_model(golden_checkpoint, config, device=CPU, dtype=torch.float32).pooler,
    )
    monkeypatch.setattr(poolers, "_ROWS_AT_A_TIME", rows_at_a_time)
    for pooler in both:
        with torch.inference_mode():
            vectors = F.normalize(pooler(filled, segments(LENGTHS)), dim=-1)
        torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-5)
    learnt = load_plain_pooler(golden_checkpoint, config, device=CPU, dtype=torch.float32)
    learning = filled.clone().requires_grad_()
    whole = F.normalize(learnt(learning, segments(LENGTHS)), dim=-1)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
    whole.sum().backward()
    assert learning.grad is not None
