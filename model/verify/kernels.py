"""The step of gpu-check that judges each fused kernel alone, against what it replaces.

Shapes: T rows, D width, I the MLP's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import fused
from model.backbone import RMSNorm
from model.fused import Fused
from model.linear.quantization import ScaledRows, float8_rows
from model.operations import InPlace
from model.rotary import HalvesRotary
from model.verify.bench import FUSED, Bench
from model.verify.outcome import at_least

_LEAST_COSINE, _LEAST_FLOAT8 = 0.9999, 0.998
"""Of a row. To float8 both round by scales that differ a little, so their errors are independent:
0.9993 is what that gives."""
Run = Callable[[], Tensor | ScaledRows]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A kernel, what torch's operations do in its place, and the bytes that must move."""

    fused: Run
    plain: Run
    moved: int


@torch.inference_mode()
def kernel(bench: Bench, name: str, rows: int, least_s: float) -> dict[str, Any]:
    """One of plan.KERNELS on T = `rows`: are the numbers the same, and how much faster is it?"""
    chosen = fused.choose(FUSED, bench.device)
    assert chosen is not None
    if name.endswith("float8"):
        bench.subject("float8")  # refuses where the device has none
    pair, untouched = (_CASES[name](bench, chosen, rows) for _ in range(2))
    cosine = _cosine(pair.fused(), untouched.plain())
    least = _LEAST_FLOAT8 if name.endswith("float8") else _LEAST_COSINE
    check = at_least(name, cosine, least, "smallest cosine of a row")
    fast, slow = (bench.seconds_of(run, least_s) for run in (pair.fused, pair.plain))
    return {
        "rows": rows,
        "fused_ms": 1e3 * fast,
        "plain_ms": 1e3 * slow,
        "times_as_fast": slow / fast,
        "bytes_per_s": pair.moved / fast,
        "checks": [asdict(check)],
    }


def _numbers(bench: Bench, *shape: int) -> Tensor:
    """The same at each call: kernels overwrite what they are given."""
    generator = torch.Generator().manual_seed(len(shape))
    dtype = getattr(torch, bench.job["base"])
    return torch.randn(shape, generator=generator).to(bench.device, dtype)


def _norm(bench: Bench, chosen: Fused, rows: int, *, float8: bool) -> _Pair:
    width = bench.config.hidden_size
    residual, update = _numbers(bench, rows, width), _numbers(bench, rows, width)
    norm = RMSNorm(width, bench.config.rms_norm_eps)
    norm.operations = InPlace()
    norm.weight = torch.nn.Parameter(_numbers(bench, width), requires_grad=False)

    def plain() -> Tensor | ScaledRows:
        _, normed = norm.add(residual, update)
        assert isinstance(normed, Tensor)
        return float8_rows(normed) if float8 else normed

    def by_kernel() -> Tensor | ScaledRows:
        return chosen.add_norm(residual, update, norm.weight, norm.eps, float8=float8)[1]

    return _Pair(by_kernel, plain, rows * width * (3 * residual.itemsize + _out(bench, float8)))


def _silu_up(bench: Bench, chosen: Fused, rows: int, *, float8: bool) -> _Pair:
    width = bench.config.intermediate_size
    gate_up = _numbers(bench, rows, 2 * width)
    room = torch.empty_like(gate_up[:, :width])

    def plain() -> Tensor | ScaledRows:
        gate, up = gate_up.chunk(2, dim=-1)
        # As the MLP, but for where silu goes: in place it would change what the kernel reads.
        active = torch.mul(F.silu(gate), up, out=room)
        return float8_rows(active) if float8 else active

    def by_kernel() -> Tensor | ScaledRows:
        return chosen.silu_up(gate_up, float8=float8)

    return _Pair(by_kernel, plain, rows * width * (2 * gate_up.itemsize + _out(bench, float8)))


def _rotary(bench: Bench, chosen: Fused, rows: int) -> _Pair:
    config = bench.config
    heads = config.num_heads + config.num_kv_heads
    x = _numbers(bench, rows, heads, config.head_dim)
    positions = torch.arange(rows, device=bench.device)
    angles = HalvesRotary.of(positions, config.rope, x.dtype)
    return _Pair(
        lambda: chosen.rotate(x, angles.cos, angles.sin),
        lambda: angles.rotate(x),
        2 * x.nbytes,
    )


def _to_float8(bench: Bench, chosen: Fused, rows: int) -> _Pair:
    x = _numbers(bench, rows, bench.config.hidden_size)
    return _Pair(lambda: chosen.to_float8(x), lambda: float8_rows(x), x.numel() * (x.itemsize + 1))


def _out(bench: Bench, float8: bool) -> int:
    """Bytes of a number that comes out."""
    dtype: torch.dtype = getattr(torch, bench.job["base"])
    return 1 if float8 else dtype.itemsize


_CASES: dict[str, Callable[[Bench, Fused, int], _Pair]] = {
    "add_norm": partial(_norm, float8=False),
    "add_norm_float8": partial(_norm, float8=True),
    "silu_up": partial(_silu_up, float8=False),
    "silu_up_float8": partial(_silu_up, float8=True),
    "rotary": _rotary,
    "to_float8": _to_float8,
}


def _cosine(got: Tensor | ScaledRows, expected: Tensor | ScaledRows) -> float:
    """The smallest of a row."""
    a, b = (
        (x if isinstance(x, Tensor) else x.values.float() * x.scales).float().flatten(1)
        for x in (got, expected)
    )
    return float(F.cosine_similarity(a, b, dim=1).min())
