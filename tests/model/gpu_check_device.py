"""What gpu-check's processes and its server run on in its tests: the emulated device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from model import fused
from model.batch import RunnerOptions
from model.runner import ModelRunner
from tests.model import fused_stand_in
from tests.model.emulated_cuda import EmulatedCuda, emulated

_MEMORY = 256_000_000
_FOR_GOOD = contextlib.ExitStack()


@contextlib.contextmanager
def device() -> Iterator[EmulatedCuda]:
    """With torch's operations in place of Triton's kernels."""
    kernels = {"triton": (lambda: fused_stand_in.launch, lambda device: None)}
    with mock.patch.dict(fused.LAUNCHES, kernels), emulated(memory=_MEMORY) as gpu:
        yield gpu


def runner(options: RunnerOptions) -> ModelRunner:
    """In a server's worker, for its whole life."""
    _FOR_GOOD.enter_context(device())
    return ModelRunner(options)
