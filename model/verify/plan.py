"""What a run of gpu-check does, in which order, and how long each step may take. Torch-free.

First what makes even a run that is cut short worth sending: the machine, the card's example, and
full batches in the precision that serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from model.verify.conduct import Step

_LOAD_S = 240.0
"""To load a model from a slow disk."""
_STEP_S = 120.0
KERNELS = (
    *("add_norm", "silu_up", "rotary"),
    *("add_norm_float8", "silu_up_float8", "to_float8"),
)
"""Those of model.fused."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much a run measures."""

    seconds: float = 8.0  # of full batches of one length
    batch_tokens: int = 8192
    lengths: tuple[int, ...] = (512, 256, 1024)  # tokens of a text, in each precision
    more_lengths: tuple[int, ...] = (20, 8192)  # in the precision that serves
    max_input_tokens: int = 32_768  # what the warm-up runs, as in the server
    lone_tokens: int = 20
    lone_runs: int = 200
    part_seconds: float = 0.2  # of each product, copy and attention alone
    rows: tuple[int, ...] = (16, 512, 8192)  # of the products
    attention_lengths: tuple[int, ...] = (512, 8192)
    copied_megabytes: int = 1024
    float16: bool = True  # where bfloat16 serves
    int8: bool = True
    accumulations: bool = True  # float8's, fast and slow, in the whole model
    fused_models: bool = True  # the kernels in the whole model, not alone only
    server: bool = True


WHOLE = Effort()
QUICK = Effort(
    seconds=3.0,
    lengths=(512,),
    more_lengths=(),
    float16=False,
    int8=False,
    accumulations=False,
    fused_models=False,
    server=False,
)


def first_steps() -> list[Step]:
    """The first tells which precision serves. Where it fails, there is no device to go on with."""
    return [
        Step(name, "machine", f"model.verify.machine:{function}", _STEP_S)
        for name, function in (
            ("machine", "device"),
            ("machine.system", "system"),
            ("software", "software"),
        )
    ]


def steps(effort: Effort, base: str, server: str | None) -> Iterator[Step]:
    """All others. base: the 16-bit dtype that serves. server: "module:function" of the step that
    runs one."""
    yield from _serving(effort, base)
    yield _parity("backbone", "referee", "backbone")
    yield Step("parity.float32", "referee", "model.verify.parity:referee", _LOAD_S)
    yield _parity(base, "referee", "cosine", variant=base)
    if effort.float16 and base != "float16":
        yield _parity("float16", "referee", "cosine", variant="float16")
    yield from _variant(effort, "float8")
    yield _parity("bits.float8", "float8", "bits", variant="float8")
    for recorded in (False, True):
        yield _lone(effort, "float8", recorded)
    if effort.accumulations:
        yield _parity("accumulation", "float8", "accumulation")
    if effort.int8:
        yield from _variant(effort, "int8")
    for kind in (base, "float8", "float8-slow"):
        yield _primitive(effort, kind, "products", kind=kind, rows=effort.rows)
    yield _primitive(effort, "copy", "bandwidth", megabytes=effort.copied_megabytes)
    yield _primitive(
        effort,
        "attention",
        "attention",
        lengths=effort.attention_lengths,
        batch_tokens=effort.batch_tokens,
    )
    yield from _fused(effort, base)
    if effort.server and server:
        options = {"seconds": 2 * effort.seconds, "lone_runs": effort.lone_runs}
        options |= {"lone_tokens": effort.lone_tokens, "length": effort.lengths[0]}
        options |= {"max_input_tokens": effort.max_input_tokens, "ready_s": _LOAD_S}
        yield Step("server", "server", server, _LOAD_S + _STEP_S, options)


def _serving(effort: Effort, base: str) -> Iterator[Step]:
    """All that is measured in the precision that serves, in one process."""
    yield _start(effort, base)
    yield _parity("tokens", base, "tokens")
    yield _parity("card", base, "card", variant=base)
    for length in (*effort.lengths, *effort.more_lengths):
        yield _forward(effort, base, length)
    for recorded in (False, True):
        yield _lone(effort, base, recorded)
    yield _parity("vectors", base, "vectors", variant=base)
    yield _parity("parts", base, "parts", variant=base)
    yield _parity(f"bits.{base}", base, "bits", variant=base)
    for name, length, tokens in (
        ("full", effort.lengths[0], effort.batch_tokens),
        ("lone", effort.lone_tokens, effort.lone_tokens),
    ):
        options = {"variant": base, "length": length, "batch_tokens": tokens}
        yield Step(f"profile.{name}", base, "model.verify.profile:profile", _STEP_S, options)
    options = {"variant": base, "length": effort.lengths[0]}
    options |= {"batch_tokens": effort.batch_tokens}
    faults = "model.verify.faults:out_of_memory"
    yield Step("faults.out_of_memory", base, faults, _STEP_S, options)


def _variant(effort: Effort, variant: str) -> Iterator[Step]:
    """What is measured in each further precision that saves time or memory."""
    yield _start(effort, variant)
    for length in effort.lengths:
        yield _forward(effort, variant, length)
    yield _parity(variant, variant, "cosine", variant=variant)


def _fused(effort: Effort, base: str) -> Iterator[Step]:
    """The fused kernels alone, then in the model, by the measures of the plain one."""
    for name in KERNELS:
        options = {"name": name, "rows": effort.batch_tokens, "least_s": effort.part_seconds}
        measure = "model.verify.kernels:kernel"
        yield Step(f"fused.kernels.{name}", "products", measure, _STEP_S, options)
    for precision in (base, "float8") if effort.fused_models else ():
        variant, length = f"{precision}-fused", effort.lengths[0]
        yield replace(_start(effort, variant), name=f"fused.{precision}.start")
        yield replace(_forward(effort, variant, length), name=f"fused.{precision}.{length}")
        cosine = _parity(variant, variant, "cosine", variant=variant)
        yield replace(cosine, name=f"fused.{precision}.parity")
        for recorded in (False, True):
            lone = _lone(effort, variant, recorded)
            yield replace(lone, name=f"fused.{precision}.{lone.name.rpartition('.')[2]}")


def _start(effort: Effort, variant: str) -> Step:
    options = {
        "variant": variant,
        "max_batch_tokens": effort.batch_tokens,
        "max_input_tokens": effort.max_input_tokens,
    }
    return Step(f"start.{variant}", variant, "model.verify.speed:start", _LOAD_S, options)


def _forward(effort: Effort, variant: str, length: int) -> Step:
    options = {"variant": variant, "length": length}
    options |= {"batch_tokens": effort.batch_tokens, "seconds": effort.seconds}
    name = f"forward.{variant}.{length}"
    return Step(name, variant, "model.verify.speed:forward", _STEP_S, options)


def _lone(effort: Effort, variant: str, recorded: bool) -> Step:
    options = {"variant": variant, "recorded": recorded}
    options |= {"tokens": effort.lone_tokens, "runs": effort.lone_runs}
    name = f"lone.{variant}.{'recorded' if recorded else 'eager'}"
    return Step(name, variant, "model.verify.speed:lone", _STEP_S, options)


def _parity(part: str, process: str, function: str, **options: Any) -> Step:
    return Step(f"parity.{part}", process, f"model.verify.parity:{function}", _LOAD_S, options)


def _primitive(effort: Effort, part: str, function: str, **options: Any) -> Step:
    options["least_s"] = effort.part_seconds
    measure = f"model.verify.primitives:{function}"
    return Step(f"products.{part}", "products", measure, _STEP_S, options)
