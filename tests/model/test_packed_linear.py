from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.config import NVEmbedConfig
from model.loader import load_model
from model.packed_linear import PackedLinear, is_faster, packed

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    not is_faster(CPU, torch.bfloat16), reason="this processor has no bfloat16 products in oneDNN"
)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 129, 1000])
@torch.inference_mode()
def test_it_is_the_plain_product(rows: int, bias: bool) -> None:
    """On rows that lie apart, too: the MLP's activation is half of each row of its memory."""
    plain = nn.Linear(96, 160, bias=bias).to(torch.bfloat16)
    layer = PackedLinear(plain)
    layer.weight = packed(plain.weight.detach())
    x = torch.randn(rows, 2 * 96).to(torch.bfloat16).chunk(2, dim=-1)[0]
    expected = F.linear(x.float(), plain.weight.float(), plain.bias.float() if bias else None)
    torch.testing.assert_close(layer(x).float(), expected, atol=0.02, rtol=0.01)
    if not bias:
        torch.testing.assert_close(layer(x), plain(x), atol=0, rtol=0)


def test_where_it_is_taken(golden_checkpoint: Path, golden_config: NVEmbedConfig) -> None:
    """In bfloat16 on the CPU every linear layer; what is quantized stays as it is."""
    assert not is_faster(CPU, torch.float32)
    assert not is_faster(torch.device("cuda"), torch.bfloat16)
    plain = load_model(golden_checkpoint, golden_config, device=CPU, dtype=torch.bfloat16)
    kinds = {type(m) for m in plain.modules() if hasattr(m, "in_features")}
    assert kinds == {PackedLinear}
    eight = load_model(
        golden_checkpoint, golden_config, device=CPU, dtype=torch.bfloat16, quantize="int8-dynamic"
    )
    kinds = {type(m) for m in eight.backbone.modules() if hasattr(m, "in_features")}
    assert PackedLinear not in kinds
    kinds = {type(m) for m in eight.pooler.modules() if hasattr(m, "in_features")}
    assert kinds == {PackedLinear}
