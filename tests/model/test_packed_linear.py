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

from model import packed_linear
from model.config import NVEmbedConfig
from model.loader import load_model
from model.packed_linear import MKLLinear, OneDNNLinear, PackedLinear, choose

CPU = torch.device("cpu")
X86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
HAS_BFLOAT16 = X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
HAS_MKL = X86 and torch.backends.mkl.is_available()
needs_mkl = pytest.mark.skipif(not HAS_MKL, reason="this torch has no MKL")
DTYPES = (
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no bfloat16 products in oneDNN here"),
    ),
    pytest.param(torch.float32, marks=needs_mkl),
)


def layer_of(plain: nn.Linear, dtype: torch.dtype) -> PackedLinear:
    kind = choose(CPU, dtype)
    assert kind is not None
    layer = kind(plain)
    layer.weight = layer.packed(plain.weight.detach())
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 129, 1000])
@torch.inference_mode()
def test_it_is_the_plain_product(rows: int, bias: bool, dtype: torch.dtype) -> None:
    """On rows that lie apart, too."""
    plain = nn.Linear(96, 160, bias=bias).to(dtype)
    layer = layer_of(plain, dtype)
    x = torch.randn(rows, 2 * 96).to(dtype).chunk(2, dim=-1)[0]
    expected = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    atol, rtol = (0.02, 0.01) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    torch.testing.assert_close(layer(x).double(), expected, atol=atol, rtol=rtol)
    if dtype == torch.bfloat16 and not bias:
        torch.testing.assert_close(layer(x), plain(x), atol=0, rtol=0)


MANY_ROWS = """
import torch
from torch import nn
from model.packed_linear import MKLLinear
for threads in (1, 2):
    for inputs, outputs in ((64, 48), (257, 131), (768, 1280)):
        torch.set_num_threads(threads)
        plain = nn.Linear(inputs, outputs, bias=False)
        layer = MKLLinear(plain)
        layer.weight = layer.packed(plain.weight.detach())
        for used in (threads, 3 - threads):
            torch.set_num_threads(used)
            for rows in (*range(1, 67), 127, 200, 255, 257, 777, 1024, 1500):
                x = torch.randn(rows, inputs)
                expected = x.double() @ plain.weight.double().T
                torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
"""


@needs_mkl
@pytest.mark.parametrize("instructions", ["SSE4_2", "AVX2", "AVX512"])
def test_mkls_layout_serves_any_number_of_rows(instructions: str) -> None:
    """As MKL works on this processor and on lesser ones (on others it ignores the name)."""
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions}
    command = [sys.executable, "-c", f"import torch\nwith torch.no_grad():\n exec({MANY_ROWS!r})"]
    subprocess.run(command, check=True, env=environment)


@needs_mkl
def test_a_processor_on_which_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.ops.mkl._mkl_linear

    def wrong_beyond_256(x: torch.Tensor, *rest: object) -> torch.Tensor:
        out: torch.Tensor = product(x, *rest)
        return out if len(x) <= 256 else out + 0.01

    packed_linear._mkl_takes_any_rows.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.mkl, "_mkl_linear", wrong_beyond_256)
        assert choose(CPU, torch.float32) is None
    packed_linear._mkl_takes_any_rows.cache_clear()
    assert choose(CPU, torch.float32) is MKLLinear


@needs_mkl
def test_other_defaults_of_the_program_and_its_random_numbers_are_left_alone() -> None:
    packed_linear._mkl_takes_any_rows.cache_clear()
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert choose(CPU, torch.float32) is MKLLinear
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_it_is_taken(
    golden_checkpoint: Path, golden_config: NVEmbedConfig, dtype: torch.dtype
) -> None:
    """On the CPU every linear layer; what is quantized stays as it is."""
    assert choose(torch.device("cuda"), dtype) is None
    expected = {OneDNNLinear if dtype == torch.bfloat16 else MKLLinear}
    plain = load_model(golden_checkpoint, golden_config, device=CPU, dtype=dtype)
    assert {type(m) for m in plain.modules() if hasattr(m, "in_features")} == expected
    eight = load_model(
        golden_checkpoint, golden_config, device=CPU, dtype=dtype, quantize="int8-dynamic"
    )
    kinds = {type(m) for m in eight.backbone.modules() if hasattr(m, "in_features")}
    assert not kinds & {MKLLinear, OneDNNLinear}
    assert {type(m) for m in eight.pooler.modules() if hasattr(m, "in_features")} == expected
