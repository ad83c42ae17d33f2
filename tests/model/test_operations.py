"""What a GPU runs in one forward at the official size, counted on meta tensors: operations, and the
bytes that quantizing moves. A fused kernel counts as one, through the launch that stands in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.attention.kernels import choose_kernel
from model.batch import Encoding
from model.config import ModelConfig
from model.fused import Fused
from model.packing import pack
from model.weights.loader import empty_model
from tests.model.test_config import OFFICIAL
from tests.model.torches import needs_shared_heads

META = torch.device("meta")
CONFIG = ModelConfig.from_dict(OFFICIAL)
LAYERS = CONFIG.num_hidden_layers
pytestmark = needs_shared_heads
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided"}


class Operations(TorchDispatchMode):
    """Counts all but views and allocations, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = op._schema.name.partition("::")[2]
        out = op(*args, **(kwargs or {}))
        if name not in ALLOCATIONS and not is_view(op, args, out):
            self.counts[name] += 1
        return out


def is_view(op: OpOverload, args: Any, out: Any) -> bool:
    """Whether it gave no more than another look at an argument. `to` and the like say that they may
    give one, and copy all the same."""
    if any(argument.is_write for argument in op._schema.arguments):
        return False
    memory = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return all(x.untyped_storage()._cdata in memory for x in results)


class Kernels:
    """Counts the launches, and for each the bytes of what only float8 needs and the numbers that
    become float8."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.bytes = self.numbers = 0

    def launch(self, kernel: str, programs: int, *args: Any, **constants: Any) -> None:
        self.counts[kernel] += 1
        tensors = [x for x in args if isinstance(x, Tensor)]
        values, scales = tensors[-2:]
        if kernel != "rotate" and values.dtype == torch.float8_e4m3fn:
            moved = [values, scales]
            if kernel == "to_float8":  # the others read their inputs for other ends
                moved.append(tensors[0])
            self.bytes += sum(x.numel() * x.itemsize for x in moved)
            self.numbers += values.numel()


def forward(quantize: str, kernels: Kernels | None) -> Counter[str]:
    model: nn.Module = empty_model(CONFIG, quantize=quantize, dtype=torch.bfloat16)
    if kernels is not None:
        model.backbone.use(Fused(kernels.launch))  # type: ignore[operator, union-attr]
    _, attend = choose_kernel("varlen", META, torch.bfloat16)
    encodings = [Encoding(np.ones(512, dtype=np.int32), 20) for _ in range(16)]
    batch = pack(encodings, META)
    with torch.inference_mode(), Operations() as operations:
        model(batch, attend)
    return operations.counts


@pytest.mark.parametrize(("quantize", "most"), [("none", 590), ("float8", 1360)])
def test_operations_without_fused_kernels(quantize: str, most: int) -> None:
    counts = forward(quantize, None)
    assert counts.total() <= most, counts


@pytest.mark.parametrize(("quantize", "most"), [("none", 360), ("float8", 390)])
def test_operations_with_fused_kernels(quantize: str, most: int) -> None:
    kernels = Kernels()
    counts = forward(quantize, kernels)
    assert counts.total() + kernels.counts.total() <= most, (counts, kernels.counts)
    expected = {"add_norm": 2 * LAYERS + 1, "silu_up": LAYERS, "rotate": LAYERS + 1}
    if quantize == "float8":
        expected["to_float8"] = LAYERS
    assert kernels.counts == expected
    assert not counts.keys() & {"silu_", "rms_norm", "addcmul_", "clamp_min_"}


def test_quantizing_moves_at_most_4_bytes_a_number() -> None:
    """1 to write it, a share of its scale, and 2 to read it where no other kernel does."""
    kernels = Kernels()
    forward("float8", kernels)
    assert 1 < kernels.bytes / kernels.numbers <= 4, kernels.bytes / kernels.numbers
