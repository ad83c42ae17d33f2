"""The emulated device: tensors, memory, operations, recordings. How it is used, and what it cannot
show, is told in `emulated_cuda`.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.model import emulated_kernels
from tests.model.emulated_kernels import RefusedError, name_of

CUDA = torch.device("cuda", 0)
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
        assert Placing.device is not None, "a tensor has outlived its emulated device"
        return Placing.device.run(op, args, kwargs or {})


class Placing(TorchDispatchMode):
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
                with Placing():
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

                with Placing():
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
        assert Placing.device is not None
        Placing.device.launches["graph"] += 1
        self.tape.play()


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
