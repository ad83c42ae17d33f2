"""The plan of gpu-check fits what it calls, and the report that it fills."""

from __future__ import annotations

import inspect
from itertools import groupby

import pytest

from model.verify import plan
from model.verify.child import called
from model.verify.conduct import Step
from model.verify.report import SECTIONS

SERVER = "server.cli.gpu_check_server:serving"


def all_steps(effort: plan.Effort, base: str) -> list[Step]:
    return [*plan.first_steps(), *plan.steps(effort, base, SERVER)]


@pytest.mark.parametrize("base", ["bfloat16", "float16"])
@pytest.mark.parametrize("effort", [plan.WHOLE, plan.QUICK], ids=["whole", "quick"])
def test_each_step_can_be_called_and_has_a_place(effort: plan.Effort, base: str) -> None:
    steps = all_steps(effort, base)
    for step in steps:
        inspect.signature(called(step.measure)).bind(None, **step.options)
        assert step.name.partition(".")[0] in SECTIONS
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    processes = [process for process, _ in groupby(steps, key=lambda step: step.process)]
    assert len(set(processes)) == len(processes), "a model would be loaded twice"


def test_what_matters_most_comes_first() -> None:
    names = [step.name for step in all_steps(plan.WHOLE, "bfloat16")]
    first = ["machine", "software", "parity.card", "forward.bfloat16.512"]
    assert [name for name in names if name in first] == first
    assert names.index("forward.bfloat16.512") < 8


def test_every_figure_that_is_wanted_is_planned() -> None:
    names = {step.name for step in all_steps(plan.WHOLE, "bfloat16")}
    for variant in ("bfloat16", "float8", "int8"):
        assert {f"forward.{variant}.{length}" for length in (256, 512, 1024)} <= names
    assert {"forward.bfloat16.20", "forward.bfloat16.8192"} <= names
    for variant in ("bfloat16", "float8"):
        assert {f"lone.{variant}.{how}" for how in ("eager", "recorded")} <= names
    assert {f"parity.{kind}" for kind in ("bfloat16", "float16", "int8", "float8")} <= names
    left_out = names - {step.name for step in all_steps(plan.QUICK, "bfloat16")}
    assert {"server", "start.int8", "forward.bfloat16.256"} <= left_out
    assert not {"forward.bfloat16.512", "parity.float8", "lone.float8.recorded"} & left_out
