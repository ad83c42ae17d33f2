"""The step of gpu-check that takes memory away: a batch that does not fit is halved."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from model.fitting import FittingRunner
from model.verify.bench import Bench
from model.verify.outcome import Check, at_least, smallest_cosine, status_of
from model.verify.subject import SAME_DTYPE_COSINE


def out_of_memory(bench: Bench, variant: str, length: int, batch_tokens: int) -> dict[str, Any]:
    """A batch in the room of half of what it takes: in halves it gives the same vectors, and the
    memory is there again afterwards."""
    runner, device = bench.runner(variant), bench.device
    encodings = bench.texts(length, batch_tokens)
    expected = runner.embed(encodings)
    torch.cuda.empty_cache()
    bench.memory()
    resting = torch.cuda.memory_allocated(device)
    runner.embed(encodings)
    needed = bench.memory()["allocated_bytes"] - resting
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    ballast = torch.empty(max(0, free - needed // 2), dtype=torch.uint8, device=device)
    fitting = FittingRunner(runner)
    try:
        rows, too_large = fitting.embed(encodings)
    finally:
        del ballast
        torch.cuda.empty_cache()
    after = torch.cuda.memory_allocated(device)
    again = runner.embed(encodings)
    cosine = smallest_cosine(rows, expected)
    found = {
        "halved": fitting.budget is not None,
        "all there": not too_large,
        "memory given back": after <= resting,
        "works afterwards": bool(np.isfinite(again).all()),
    }
    checks = [Check(name, status_of(good), good, True) for name, good in found.items()]
    checks.append(at_least("vectors", cosine, SAME_DTYPE_COSINE, "smallest cosine"))
    return {
        "activation_bytes": needed,
        "tokens": sum(map(len, encodings)),
        "budget": fitting.budget,
        "too_large": len(too_large),
        "resting_bytes": resting,
        "after_bytes": after,
        "checks": [asdict(check) for check in checks],
    }
