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

import collections
import contextlib
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.model import emulated_kernels
from tests.model.emulated_kernels import RefusedError, name_of

CUDA = torch.device("cuda", 0)
GUARD_TABLE = "_ZN3c104impl26device_guard_impl_registryE"
"""c10::impl::device_guard_impl_registry: a pointer for each DeviceType. Private to torch."""
_CUDA_TYPE, _META_TYPE = 1, 14  # c10::DeviceType
_PAGE = 512  # bytes: the allocator rounds up to it


class OnCuda(Tensor):
    """A tensor on cuda:0: its data is `inner`, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCuda:
        made: OnCuda = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
            requires_grad=False,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        assert _Placing.device is not None, "a tensor has outlived its emulated device"
        return _Placing.device.run(op, args, kwargs or {})


class _Placing(TorchDispatchMode):
    """Sends to the emulated device what would make a tensor there."""

    device: EmulatedCuda | None = None

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if name_of(op) == "_to_copy" and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": CUDA}  # "cuda" without an index: the lent guard says meta
        values = (*args, *kwargs.values())
        there = any(isinstance(x, torch.device) and x.type == "cuda" for x in values)
        if there or any(issubclass(kind, OnCuda) for kind in types):
            assert self.device is not None
            return self.device.run(op, args, kwargs)
        return op(*args, **kwargs)


@dataclass(slots=True)
class Tape:
    """A recorded graph: operations on the CPU's data, and the views that must stay alive."""

    steps: list[tuple[Callable[..., Any], Any, Any, Any]] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    def play(self) -> None:
        for run, args, kwargs, before in self.steps:
            again = run(*args, **kwargs)
            for new, old in zip(tree_flatten(again)[0], tree_flatten(before)[0], strict=True):
                if isinstance(old, Tensor) and new is not old:
                    old.copy_(new)


class EmulatedCuda:
    """One device: its memory, what ran on it, and the graph that is being recorded."""

    def __init__(self, capability: tuple[int, int], memory: int | None, name: str) -> None:
        self.capability, self.memory, self.name = capability, memory, name
        self.used = self.peak = 0  # bytes
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: list[str] = []
        self.tape: Tape | None = None
        self._live: dict[int, int] = {}  # storage -> bytes
        self._pinned: set[int] = set()
        self._lock = threading.RLock()

    def limit(self) -> int:
        return self.memory or 80 * 10**9

    # -- memory

    def book(self, inner: Tensor) -> None:
        """Count the storage of `inner`. Raises OutOfMemoryError when it does not fit."""
        storage = inner.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _PAGE) * _PAGE
        with self._lock:
            if key in self._live:
                return
            if self.used + size > self.limit():
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size} bytes: {self.used} of "
                    f"{self.limit()} are in use (emulated)"
                )
            self._live[key] = size
            self.used += size
            self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self._give_back, key)

    def _give_back(self, key: int) -> None:
        with self._lock:
            self.used -= self._live.pop(key, 0)

    def pin(self, tensor: Tensor) -> Tensor:
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return pinned

    # -- operations

    def run(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            name = name_of(op)
            if (
                name not in emulated_kernels.WHOLE
                and torch._C._dispatch_has_kernel_for_dispatch_key(
                    op.name(), "CompositeImplicitAutograd"
                )
            ):
                with _Placing():
                    out = op.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
            if name == "_to_copy":
                return self._to_copy(op, args, kwargs)
            if name == "copy_":
                return self._copy(op, args, kwargs)
            _check_devices(name, args, kwargs)
            if reason := emulated_kernels.host_reads(op, args, kwargs):
                self.wait(reason)
            if name == "_local_scalar_dense":
                return op(args[0].inner)
            if name == "_varlen_attn":  # torch's own Python around the kernel
                from torch.nn.attention import varlen

                with _Placing():
                    return varlen._varlen_attn._init_fn(*args, **kwargs)
            instead = emulated_kernels.KERNELS.get(name)
            if instead is None:
                return self.launch(op, op, args, kwargs)
            instead.check(self.capability, *args, **kwargs)
            return self.launch(op, instead.run or op, args, kwargs)

    def launch(self, op: OpOverload, kernel: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run `kernel` in op's place on the CPU's data, and put what comes of it here."""
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        if "device" in inner_kwargs:
            inner_kwargs = {**inner_kwargs, "device": torch.device("cpu")}
        if inner_kwargs.get("pin_memory"):
            inner_kwargs = {**inner_kwargs, "pin_memory": False}
        if name_of(op) in emulated_kernels.UNWRITTEN:
            kernel = emulated_kernels.unwritten(kernel)
        out = kernel(*inner_args, **inner_kwargs)
        is_view = _is_view(op)
        if self.tape is not None:
            if is_view:
                self.tape.kept.append(out)
            else:
                self.tape.steps.append((kernel, inner_args, inner_kwargs, out))
        if not is_view and name_of(op) not in emulated_kernels.UNWRITTEN:
            self.launches[name_of(op)] += 1
        given = {id(x.inner): x for x in tree_flatten((args, kwargs))[0] if isinstance(x, OnCuda)}

        def here(made: Any) -> Any:
            if not isinstance(made, Tensor):
                return made
            if id(made) in given:  # written in place
                return given[id(made)]
            self.book(made)
            return OnCuda(made)

        return tree_map(here, out)

    # -- what the host waits for

    def wait(self, reason: str) -> None:
        self._not_recording(reason)
        self.waits.append(reason)

    def _not_recording(self, what: str) -> None:
        if self.tape is not None:
            raise RefusedError(f"{what}: operation not permitted when stream is capturing")

    def _to_copy(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        source = args[0]
        device = torch.device(kwargs.get("device") or source.device)
        dtype = kwargs.get("dtype") or source.dtype
        if device.type == "cuda" and not isinstance(source, OnCuda):
            self._upload(source, kwargs.get("non_blocking", False))
            inner = source.to(dtype, copy=True)
            self.book(inner)
            return OnCuda(inner)
        if device.type == "cpu" and isinstance(source, OnCuda):
            self.wait("a copy to the host")
            return source.inner.to(dtype, copy=True)
        within = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        return self.launch(op, op, args, within)

    def _copy(self, op: OpOverload, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if isinstance(target, OnCuda) == isinstance(source, OnCuda):
            return self.launch(op, op, args, kwargs)
        if isinstance(target, OnCuda):
            self._upload(source, non_blocking)
        else:
            self.wait("a copy to the host")
        _inner(target).copy_(_inner(source))
        return target

    def _upload(self, source: Tensor, non_blocking: bool) -> None:
        """From memory that is not pinned the host waits, whatever it asked for."""
        self._not_recording("a copy from the host")
        self.launches["upload"] += 1
        if not non_blocking or source.untyped_storage()._cdata not in self._pinned:
            self.wait("a copy from the host")

    # -- graphs

    @contextlib.contextmanager
    def recording(self, graph: Graph, **_: Any) -> Iterator[None]:
        assert self.tape is None, "two recordings at once"
        self.tape = Tape()
        try:
            yield
            graph.tape = self.tape
        finally:
            self.tape = None


class Graph:
    """torch.cuda.CUDAGraph."""

    tape: Tape

    def replay(self) -> None:
        assert _Placing.device is not None
        _Placing.device.launches["graph"] += 1
        self.tape.play()


class _Stream:
    """One stream is all there is: everything runs at once."""

    def __init__(self, device: Any = None, **_: Any) -> None: ...

    def wait_stream(self, other: _Stream) -> None: ...

    def synchronize(self) -> None:
        assert _Placing.device is not None
        _Placing.device.wait("a stream")


class _Event:
    """Times the host, which is all that works."""

    def __init__(self, **_: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnCuda) else x


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """One device an operation; a number may come from the host."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [isinstance(x, OnCuda) for x in tensors]
    if any(ours) and any(x.dim() for x, here in zip(tensors, ours, strict=True) if not here):
        raise RefusedError(f"{name}: expected all tensors on one device, found cuda:0 and cpu")


def _is_view(op: OpOverload) -> bool:
    schema = op._schema
    reads = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    return reads and any(r.alias_info is not None for r in schema.returns)


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
        with _Placing():
            run_thread(thread)

    with contextlib.ExitStack() as stack:
        stack.enter_context(device_guard())
        replaced = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, replaced)
        stack.enter_context(mock.patch.object(_Placing, "device", gpu))
        for attribute, value in _torch_cuda(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, attribute, value))
        pin = mock.patch.object(Tensor, "pin_memory", lambda tensor, *_, **__: gpu.pin(tensor))
        stack.enter_context(pin)
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_placed))
        stack.enter_context(_Placing())
        yield gpu
