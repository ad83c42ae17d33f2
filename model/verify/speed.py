"""Steps of gpu-check that time the model: a start, full batches, a lone query."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UnsupportedError
from model.verify.bench import Bench, in_ms, precision_of, walls
from model.verify.machine import AT_WORK, nvidia_smi
from model.verify.primitives import product_s, shapes


def start(bench: Bench, variant: str, **options: int) -> dict[str, Any]:
    """Seconds of each part of a worker's start, and the memory after it.

    options: of RunnerOptions, what the warm-up runs."""
    stages: dict[str, Any] = {"import": {"seconds": bench.import_s}}
    with bench.stage(stages, "context"):
        torch.zeros(1, device=bench.device)
    with bench.stage(stages, "load"):
        runner = bench.runner(variant, **options)
    weights = sum(parameter.nbytes for parameter in runner.model.parameters())
    stages["load"]["weight_bytes"] = weights
    stages["load"]["bytes_per_s"] = weights / stages["load"]["seconds"]
    with bench.stage(stages, "warm_up"):
        stages["tokens_per_s"] = runner.warm_up()
    try:
        with bench.stage(stages, "recording"):
            bench.recorded(variant)
    except UnsupportedError as error:
        stages["recording"] = str(error)
    return stages


def forward(
    bench: Bench, variant: str, length: int, batch_tokens: int, seconds: float
) -> dict[str, Any]:
    """Full batches of texts of one length, as they are served: ids in, rows on the host out."""
    runner, encodings = bench.runner(variant), bench.texts(length, batch_tokens)
    for _ in range(2):
        rows = runner.embed(encodings)
    assert np.isfinite(rows).all(), "vectors that are not finite"
    bench.memory()
    times = walls(lambda: runner.embed(encodings), seconds)
    rows_in, median = sum(map(len, encodings)), float(np.median(times))
    found = {
        "tokens": rows_in,
        **in_ms(times, 10, 50, 90),
        "tokens_per_s": rows_in / median,
        "tflops": flops(bench.config, [len(e) for e in encodings]) / median / 1e12,
        "nvidia_smi": nvidia_smi(AT_WORK),
        **bench.memory(),
    }
    precision = precision_of(variant)
    if precision == "int8":  # LLM.int8's products are no ceiling
        return found
    ceiling = bench.config.num_hidden_layers * sum(
        product_s(bench, rows_in, *shape, precision, least_s=seconds / 40)
        for shape in shapes(bench.config).values()
    )
    return {**found, "products_ms": 1e3 * ceiling, "share_of_products": ceiling / median}


def flops(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Of the backbone's products and attention: 2 for each multiplication with its sum."""
    products = 2 * sum(lengths) * sum(i * o for i, o in shapes(config).values())
    attention = 4 * sum(length**2 for length in lengths) * config.q_size
    return config.num_hidden_layers * (products + attention)


def lone(bench: Bench, variant: str, tokens: int, runs: int, recorded: bool) -> dict[str, Any]:
    """One short text at a time: until the host has launched it, on the device, and in all."""
    encodings = bench.texts(tokens, tokens)
    whole = bench.recorded(variant) if recorded else bench.runner(variant).embed
    for _ in range(5):
        whole(encodings)
    times = np.concatenate([walls(lambda: whole(encodings), 0.0, 1) for _ in range(runs)])
    found = {"tokens": tokens, **in_ms(times, 10, 50, 99)}
    if not recorded:
        _, working = bench.loaded(variant)
        found |= _launch(
            bench, lambda: working.model(working.pack(encodings), working.attend), runs
        )
    return found


@torch.inference_mode()
def _launch(bench: Bench, run: Callable[[], Tensor], runs: int) -> dict[str, float]:
    """Milliseconds until `run` returns, and between two events on the device around it."""
    hosts, devices = [], []
    with torch.cuda.device(bench.device):  # the events' own
        for _ in range(min(runs, 20)):
            before, after = (_event() for _ in range(2))
            bench.synchronize()
            started = time.perf_counter()
            before.record()
            run()
            after.record()
            hosts.append(1e3 * (time.perf_counter() - started))
            bench.synchronize()
            devices.append(before.elapsed_time(after))
    return {"host_ms": float(np.median(hosts)), "device_ms": float(np.median(devices))}


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
