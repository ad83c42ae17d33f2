"""Steps of gpu-check that time the parts of a forward alone: products, attention, copies.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from model.attention.kernels import choose_kernel, planner_of
from model.config import ModelConfig
from model.linear.quantization import Float8Linear, float8_rows
from model.packing import pack
from model.platform.products import layer_of
from model.verify.bench import Bench
from model.verify.precisions import SlowFloat8Linear

_FLOAT8 = {"float8": Float8Linear, "float8-slow": SlowFloat8Linear}


def shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The products of a layer: I, O."""
    width, inter = config.hidden_size, config.intermediate_size
    return {
        "qkv": (width, config.q_size + 2 * config.kv_size),
        "o": (config.q_size, width),
        "gate_up": (width, 2 * inter),
        "down": (inter, width),
    }


def products(bench: Bench, kind: str, rows: Sequence[int], least_s: float) -> dict[str, Any]:
    """Each product of a layer alone, each timed for `least_s`. kind: a dtype, float8 (with fast
    accumulation) or float8-slow."""
    found: dict[str, Any] = {}
    for name, (inputs, outputs) in shapes(bench.config).items():
        found[name] = {}
        for count in rows:
            taken = product_s(bench, count, inputs, outputs, kind, least_s)
            tflops = 2 * count * inputs * outputs / taken / 1e12
            found[name][str(count)] = {"ms": 1e3 * taken, "tflops": tflops}
    return found


@torch.inference_mode()
def product_s(
    bench: Bench, rows: int, inputs: int, outputs: int, kind: str, least_s: float
) -> float:
    """Seconds of x [T, I] by W [O, I]; float8 without what quantizes x."""
    device, eight_bit = bench.device, _FLOAT8.get(kind)
    dtype = torch.bfloat16 if eight_bit else getattr(torch, kind)
    x, weight = (torch.randn(n, inputs, device=device).to(dtype) for n in (rows, outputs))
    if eight_bit is None:
        return bench.seconds_of(lambda: F.linear(x, weight), least_s)
    bench.subject("float8")  # refuses where the device has none
    layer, scaled = layer_of(eight_bit, weight, dtype), float8_rows(x)
    return bench.seconds_of(lambda: layer(scaled), least_s)


@torch.inference_mode()
def bandwidth(bench: Bench, megabytes: int, least_s: float) -> dict[str, float]:
    """Copying memory on the device: bytes read and written a second."""
    x = torch.zeros(megabytes << 20, dtype=torch.uint8, device=bench.device)
    y = torch.empty_like(x)
    taken = bench.seconds_of(lambda: y.copy_(x), least_s)
    return {"bytes_per_s": 2 * x.nbytes / taken}


@torch.inference_mode()
def attention(
    bench: Bench, lengths: Sequence[int], batch_tokens: int, least_s: float
) -> dict[str, Any]:
    """The kernel that serves, on full batches of texts of one length."""
    config, device = bench.config, bench.device
    dtype = getattr(torch, bench.job["base"])
    name, attend = choose_kernel(bench.job["attention"], device, dtype)
    planner = planner_of(attend, dtype, causal=False)
    found: dict[str, Any] = {"kernel": name}
    for length in lengths:
        batch = pack(bench.texts(length, batch_tokens), device, planner=planner)
        q, k, v = (
            torch.randn(batch.num_tokens, heads, config.head_dim, device=device).to(dtype)
            for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        )
        run = partial(attend, q, k, v, batch.seqs, batch.seqs)
        taken = bench.seconds_of(run, least_s)
        done = 4 * batch.num_seqs * length**2 * config.q_size
        found[str(length)] = {"ms": 1e3 * taken, "tflops": done / taken / 1e12}
    return found
