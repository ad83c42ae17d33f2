"""Checks of the precisions: 16 and 8 bit against float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from model.config import ModelConfig
from model.linear.quantization import Float8Linear
from model.verify.outcome import Check, at_least, skipped, smallest_cosine
from model.verify.subject import Measured, Subject, load, no_room, sample_encodings

DTYPE_COSINE = {
    "bfloat16": 0.995,
    "float16": 0.999,
    "int8": 0.99,
    "int8-dynamic": 0.99,
    "float8": 0.98,
}
"""Against float32."""
_OF_ONE_ROW = {"float8": 0.96}
"""Where one row is the vector, and no mean evens out what 8 bits round off."""


def least_cosine(variant: str, config: ModelConfig) -> float:
    """Of `variant` to float32."""
    if config.family.pooler == "last":
        return _OF_ONE_ROW.get(variant, DTYPE_COSINE[variant])
    return DTYPE_COSINE[variant]


class SlowFloat8Linear(Float8Linear):
    """Sums in float32, for comparison with those that serve."""

    fast_accumulation = False


def check_precisions(subject: Subject, measured: Measured) -> Iterator[Check]:
    """16 and 8 bit against float32."""
    sixteen = subject.dtype if subject.dtype != torch.float32 else torch.bfloat16
    variants = [
        ("bfloat16", torch.bfloat16, "none"),
        ("float16", torch.float16, "none"),
        ("int8", sixteen, "int8"),
        ("int8-dynamic", sixteen, "int8-dynamic"),
        ("float8", sixteen, "float8"),
    ]
    exact = measured.vectors.get("float32")
    for variant, dtype, quantization in variants:
        name = f"{variant} and float32"
        if exact is None:
            yield skipped(name, "there are no float32 vectors to compare with")
            continue
        if variant not in measured.vectors:
            if reason := no_room(subject, dtype, quantization):
                yield skipped(name, reason)
                continue
            loaded = load(subject, dtype, quantization)
            measured.vectors[variant] = loaded.embed(sample_encodings(subject))
            del loaded
        worst = smallest_cosine(measured.vectors[variant], exact)
        yield at_least(name, worst, least_cosine(variant, subject.config), "smallest cosine")
