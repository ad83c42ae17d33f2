from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig
from model.linear.packed_linear import MKLLinear, OneDNNLinear, PackedLinear
from model.linear.quantization import PlainInt8Linear
from model.platform.products import Products
from model.weights.loader import load_model
from tests.model.torches import by_mkls_instructions

CPU = torch.device("cpu")
X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
HAS_BFLOAT16 = X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
HAS_MKL = X86 and torch.backends.mkl.is_available()
needs_mkl = pytest.mark.skipif(not HAS_MKL, reason="this torch has no MKL")
LAYERS = (
    pytest.param(
        OneDNNLinear,
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no bfloat16 products in oneDNN here"),
    ),
    pytest.param(
        OneDNNLinear, torch.float32, marks=pytest.mark.skipif(not X86, reason="no oneDNN here")
    ),
    pytest.param(MKLLinear, torch.float32, marks=needs_mkl),
)


def layer_of(plain: nn.Linear, kind: type[PackedLinear]) -> PackedLinear:
    layer = kind(plain)
    layer.weight = layer.packed(plain.weight.detach())
    return layer


@pytest.mark.parametrize(("kind", "dtype"), LAYERS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 129, 1000])
@torch.inference_mode()
def test_it_is_the_plain_product(
    rows: int, bias: bool, kind: type[PackedLinear], dtype: torch.dtype
) -> None:
    """On rows that lie apart, too."""
    plain = nn.Linear(96, 160, bias=bias).to(dtype)
    layer = layer_of(plain, kind)
    x = torch.randn(rows, 2 * 96).to(dtype).chunk(2, dim=-1)[0]
    expected = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    atol, rtol = (0.02, 0.01) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(layer(x).double(), expected, atol=atol, rtol=rtol)
    if dtype == torch.bfloat16 and not bias:
        torch.testing.assert_close(layer(x), plain(x), atol=0, rtol=0)


MANY_ROWS = """
import torch
from torch import nn
from model.linear.packed_linear import MKLLinear
for threads in (1, 2):
    for inputs, outputs in ((64, 48), (257, 131), (768, 1280)):
        torch.set_num_threads(threads)
        plain = nn.Linear(inputs, outputs, bias=False)
        layer = MKLLinear(plain)
        layer.weight = layer.packed(plain.weight.detach())
        x = torch.randn(1500, inputs)
        expected = x.double() @ plain.weight.double().T
        for used in (threads, 3 - threads):
            torch.set_num_threads(used)
            for rows in (*range(1, 67), 127, 200, 255, 257, 777, 1024, 1500):
                got = layer(x[:rows]).double()
                torch.testing.assert_close(got, expected[:rows], atol=1e-5, rtol=1e-5)
"""


@pytest.mark.process
@needs_mkl
@by_mkls_instructions("SSE4_2", "AVX2", "AVX512")
def test_mkls_layout_serves_any_number_of_rows(instructions: str) -> None:
    """As MKL works on this processor and on lesser ones."""
    environment = {
        **os.environ,
        "MKL_ENABLE_INSTRUCTIONS": instructions,
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, "-c", f"import torch\nwith torch.no_grad():\n exec({MANY_ROWS!r})"]
    subprocess.run(command, check=True, env=environment)


@pytest.mark.parametrize(("kind", "dtype"), LAYERS)
def test_where_it_is_taken(
    golden_checkpoint: Path,
    golden_config: ModelConfig,
    kind: type[PackedLinear],
    dtype: torch.dtype,
) -> None:
    """Every linear layer; what is quantized stays as it is."""

    def layers_of(model: nn.Module) -> set[type[nn.Module]]:
        return {type(m) for m in model.modules() if hasattr(m, "in_features")}

    plain = load_model(
        golden_checkpoint, golden_config, device=CPU, dtype=dtype, layers=Products(dtype, kind)
    )
    assert layers_of(plain) == {kind}
    eight = load_model(
        golden_checkpoint,
        golden_config,
        device=CPU,
        dtype=dtype,
        quantize="int8-dynamic",
        layers=Products(dtype, kind, PlainInt8Linear),
    )
    assert layers_of(eight.backbone) == {PlainInt8Linear}
    assert layers_of(eight.pooler) == {kind}
