"""A CUDA device made of CPU tensors, for tests of device code on machines without a GPU.

    with emulated(capability=(9, 0), memory=2_000_000_000) as gpu:
        runner = ModelRunner(RunnerOptions(path, device="cuda"))

Tensors say that they are on cuda:0 and hold the CPU's data, so values are real. What a GPU refuses
is refused here: operands on two devices, layouts and dtypes that its kernels do not take
(`emulated_kernels`), reads by the host and transfers while a graph is recorded, more memory than
there is. Memory that nobody has written holds NaN, or -1. `gpu.waits` names each time that the
host waited for the device.

A recording is a tape of operations, played again on the same storages. Its intermediate tensors
live as long as it does, where a card's pool would use their memory again.

What it cannot show: anything asynchronous (a buffer given back or overwritten too early, two
streams in a race), the numerics and the speed of a GPU's kernels, fragmented memory, CUDA's own
errors and the driver, several devices, and libraries that take raw pointers (bitsandbytes, Triton,
the flash-attn package). Composite operations fall apart as on the CPU, so more are counted than a
GPU launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.model.emulated_device import EmulatedCuda, Graph, Placing

GUARD_TABLE = "_ZN3c104impl26device_guard_impl_registryE"
"""c10::impl::device_guard_impl_registry: a pointer for each DeviceType. Private to torch."""
_CUDA_TYPE, _META_TYPE = 1, 14  # c10::DeviceType


class _Stream:
    """One stream is all there is: everything runs at once."""

    def __init__(self, device: Any = None, **_: Any) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None:
        assert Placing.device is not None
        Placing.device.wait("a stream")


class _Event:
    """Times the host, which is all that works."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


@contextlib.contextmanager
def device_guard() -> Iterator[None]:
    """A CPU build has no device guard for CUDA, which indexing asks for: lend it that of meta
    tensors, which does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * (_META_TYPE + 1)).in_dll(library, GUARD_TABLE)
    assert table[_META_TYPE], "meta has no guard: c10::DeviceType has been renumbered"
    own = table[_CUDA_TYPE]
    table[_CUDA_TYPE] = table[_META_TYPE]
    try:
        yield
    finally:
        table[_CUDA_TYPE] = own


@contextlib.contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _torch_cuda(gpu: EmulatedCuda) -> dict[str, Any]:
    """What stands in torch.cuda's place, by name."""
    properties = SimpleNamespace(
        name=gpu.name, total_memory=gpu.limit(), multi_processor_count=132,
        major=gpu.capability[0], minor=gpu.capability[1],
    )  # fmt: skip
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "get_device_capability": lambda device=None: gpu.capability,
        "get_device_name": lambda device=None: gpu.name,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: gpu.capability >= (8, 0),
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (gpu.limit() - gpu.used, gpu.limit()),
        "memory_allocated": lambda device=None: gpu.used,
        "memory_reserved": lambda device=None: gpu.used,
        "max_memory_allocated": lambda device=None: gpu.peak,
        "max_memory_reserved": lambda device=None: gpu.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(gpu, "peak", gpu.used),
        "graph_pool_handle": lambda: (0, 0),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: _Stream(),
        "stream": _nothing,
        "device": _nothing,
        "CUDAGraph": Graph,
        "graph": gpu.recording,
    }


@contextlib.contextmanager
def emulated(
    capability: tuple[int, int] = (9, 0),
    memory: int | None = None,
    name: str = "Emulated H100",
) -> Iterator[EmulatedCuda]:
    """A CUDA device for as long as this is open, for this thread and those started in it.

    memory: bytes, 80 GB if None. It stands on the CPU's tensors alone: nothing of it may outlive
    it.
    """
    gpu = EmulatedCuda(capability, memory, name)
    run_thread = threading.Thread.run

    def run_placed(thread: threading.Thread) -> None:  # dispatch modes are a thread's own
        with Placing():
            run_thread(thread)

    with contextlib.ExitStack() as stack:
        stack.enter_context(device_guard())
        replaced = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, replaced)
        stack.enter_context(mock.patch.object(Placing, "device", gpu))
        for attribute, value in _torch_cuda(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, value))
        pin = mock.patch.object(Tensor, "pin_memory", lambda tensor, *_, **__: gpu.pin(tensor))
        stack.enter_context(pin)
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_placed))
        stack.enter_context(Placing())
        yield gpu
