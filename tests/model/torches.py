"""What the installed torch has, for tests that also run with the oldest that is allowed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch.utils import flop_counter

from model.linear.quantization import Float8Linear

_varlen = importlib.util.find_spec("torch.nn.attention.varlen")
HAS_VARLEN = _varlen is not None
"""From 2.10 on."""
VARLEN = pytest.param(
    "varlen", marks=pytest.mark.skipif(not HAS_VARLEN, reason="this torch has no varlen_attn")
)
COUNTED_VARLEN = pytest.param(
    "varlen",
    marks=pytest.mark.skipif(
        not hasattr(flop_counter, "_varlen_attn_forward_flop"),
        reason="this torch does not count varlen_attn's operations",
    ),
)


def _shares_heads() -> bool:
    """By its source, for an import takes a second of each process that collects tests."""
    return _varlen is not None and "enable_gqa: bool" in Path(str(_varlen.origin)).read_text()


needs_shared_heads = pytest.mark.skipif(
    not _shares_heads(), reason="this torch's varlen_attn shares no key heads: they are repeated"
)


def by_mkls_instructions(*names: str) -> pytest.MarkDecorator:
    """Parametrises `instructions` by values of MKL_ENABLE_INSTRUCTIONS. Only on Intel's processors
    MKL looks at it: on others all were the same run, and the first stands for them."""
    processor = Path("/proc/cpuinfo")
    intels = processor.is_file() and re.search("GenuineIntel", processor.read_text())
    return pytest.mark.parametrize("instructions", names if intels else names[:1])


def _scales_rows() -> bool:
    """By the public name where there is one, as model.linear.quantization."""
    a = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    layer = Float8Linear(16, 16)
    layer.weight = torch.nn.Parameter(a.T, requires_grad=False)
    layer.scales = torch.nn.Parameter(torch.ones(16), requires_grad=False)
    try:
        layer(torch.ones(2, 16, dtype=torch.bfloat16))
    except (RuntimeError, NotImplementedError):
        return False
    return True


needs_cpu_float8 = pytest.mark.skipif(
    not _scales_rows(), reason="this torch multiplies no float8 rows on a CPU"
)
