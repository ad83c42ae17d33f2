"""What the installed torch has, for tests that also run with the oldest that is allowed."""

from __future__ import annotations

import importlib.util

import pytest
from torch.utils import flop_counter

HAS_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
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
