"""What gpu-check's processes and its server run on in its tests: the emulated device."""

from __future__ import annotations

import contextlib

from model.batch import RunnerOptions
from model.runner import ModelRunner
from tests.model.emulated_cuda import EmulatedCuda, emulated

_MEMORY = 256_000_000
_FOR_GOOD = contextlib.ExitStack()


def device() -> contextlib.AbstractContextManager[EmulatedCuda]:
    return emulated(memory=_MEMORY)


def runner(options: RunnerOptions) -> ModelRunner:
    """In a server's worker, for its whole life."""
    _FOR_GOOD.enter_context(device())
    return ModelRunner(options)
