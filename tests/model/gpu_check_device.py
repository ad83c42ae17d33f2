"""What gpu-check's processes and its server run on in its tests: the emulated device."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from model import config, fused
from model.batch import RunnerOptions
from model.families import Family
from model.runner import ModelRunner
from tests.model import fused_stand_in
from tests.model.emulated_cuda import EmulatedCuda, emulated

CHANGES = "NV_EMBED_TEST_CHANGES"
_MEMORY = 256_000_000
_FOR_GOOD = contextlib.ExitStack()


@contextlib.contextmanager
def device() -> Iterator[EmulatedCuda]:
    """With torch's operations in place of Triton's kernels."""
    kernels = {"triton": (lambda: fused_stand_in.launch, lambda device: None)}
    with mock.patch.dict(fused.LAUNCHES, kernels), emulated(memory=_MEMORY) as gpu:
        yield gpu


@contextlib.contextmanager
def of_another_family() -> Iterator[EmulatedCuda]:
    """The same, where each family's row is changed as the environment says."""
    changes = json.loads(os.environ[CHANGES])
    right = config.recognise

    def wrong(*args: Any) -> Family:
        return replace(right(*args), **changes)

    with mock.patch.object(config, "recognise", wrong), device() as gpu:
        yield gpu


def runner(options: RunnerOptions) -> ModelRunner:
    """In a server's worker, for its whole life."""
    _FOR_GOOD.enter_context(device())
    return ModelRunner(options)
