"""Which product a model's linear layers use on this processor: proven right, then timed.

What is fastest on one processor is hundreds of times slower on another, and on some processors a
product is wrong. So the process that will compute tries the candidates of each kind (float32,
bfloat16, int8) once, on a shape of the model's own: a wrong one is out, one that takes three times
the best is dropped before it costs more, and of the rest the fastest is taken. Torch's plain
product always is a candidate; one whose operation this torch does not have is none.

Knows no checkpoint and no request. Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from model.errors import UnsupportedError
from model.linear import quantization
from model.linear.packed_linear import MKLLinear, OneDNNLinear, PackedLinear
from model.linear.quantization import (
    PlainInt8Linear,
    ScaledLinear,
    SignedInt8Linear,
    UnsignedInt7Linear,
    UnsignedInt8Linear,
)
from model.platform import resources

MODES = ("auto", "plain", "allow-slow")
"""auto: by the probe; plain: torch's own, no probe; allow-slow: as auto, and int8-dynamic is taken
where it is slower than float32, too."""

_FEW, _MANY = 16, 256
"""Rows of the timed products: about those of a query and of a batch."""
_LARGEST = 1024
"""Inputs and outputs of a timed product at most: a larger one would take too long to try."""
_ROUNDS, _LEAST_S = 3, 0.003
"""How many times each is timed at least, and for how many seconds all together."""
_DROPPED, _PATIENCE_S = 3.0, 0.01
"""A candidate that takes so many times the best is not timed on a larger product; for so many
seconds it is tried again first, since what else runs here may have been on its core."""
_MARGIN = 1.05
"""A candidate has to be so many times as fast as those before it: they are simpler."""
_PREFERRED = 1.2
"""bfloat16 has to be so many times as fast as float32 for `--dtype auto` to take it."""
_WORTHWHILE = 1.1
"""int8 has to be so many times as fast as float32 not to be refused."""
_TINY = (16, 64, 64)  # T, I, O: a reference kernel takes 1 ms for it, a good one some 0.02
_NOTHING = 2e-4
"""Seconds below which a time is that of the calls, and drops nobody."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to compute a linear layer."""

    name: str
    layer: type[nn.Module]  # nn.Linear, a PackedLinear or a ScaledLinear
    margin: float = _MARGIN


_TORCH = Candidate("torch", nn.Linear)
_PLAIN_INT8 = Candidate("torch", PlainInt8Linear)
CANDIDATES: Mapping[str, tuple[Candidate, ...]] = {
    "float32": (_TORCH, Candidate("mkl", MKLLinear), Candidate("onednn", OneDNNLinear)),
    "bfloat16": (_TORCH, Candidate("onednn", OneDNNLinear)),
    "float16": (_TORCH,),
    "int8": (
        Candidate("onednn-s8", SignedInt8Linear),
        Candidate("onednn-u8", UnsignedInt8Linear),
        # Half of the steps: only where whole 8 bits are wrong, or much slower.
        Candidate("onednn-u7", UnsignedInt7Linear, margin=2.0),
        _PLAIN_INT8,
    ),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one candidate."""

    name: str
    seconds: tuple[float, ...] = ()  # with few and with many rows, as far as it was timed
    trouble: str = ""  # why it is out

    def __str__(self) -> str:
        times = " and ".join(f"{1e3 * s:.2f}" for s in self.seconds)
        return " ".join(filter(None, (self.name, times, self.trouble and f"({self.trouble})")))


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found about the products of one kind."""

    kind: str  # float32, bfloat16, float16, int8
    best: Candidate
    seconds: tuple[float, float]  # of the best: few rows, many rows
    trials: tuple[Trial, ...]

    def faster_than(self, other: Probe) -> float:
        """How many times as fast as `other`: the geometric mean over few and many rows."""
        return math.sqrt(math.prod(other.seconds) / math.prod(self.seconds))

    def __str__(self) -> str:
        tried = ", ".join(map(str, self.trials))
        return f"{self.kind} by {self.best.name} (ms with {_FEW} and {_MANY} rows: {tried})"


@dataclass(frozen=True, slots=True)
class Products:
    """The linear layers of one model on one device."""

    dtype: torch.dtype
    linear: type[nn.Module]  # nn.Linear or a PackedLinear
    eight_bit: type[ScaledLinear] | None = None  # those of the backbone, if they are quantized so
    probes: tuple[Probe, ...] = ()

    @property
    def compiles_rows(self) -> bool:
        """Whether code and memory are kept for each number of rows that is multiplied."""
        layers = [self.linear] if self.eight_bit is None else [self.linear, self.eight_bit]
        return any(self._compiles(layer) for layer in layers)

    def _compiles(self, layer: type[nn.Module]) -> bool:
        if issubclass(layer, PackedLinear | ScaledLinear):
            return layer.compiles_rows
        # Plain products go through oneDNN, but for MKL's in float32.
        return self.dtype != torch.float32 or not _has_mkl()

    @property
    def steps(self) -> str:
        """What is to be said of a quantization whose activations have fewer steps than it names."""
        return " (7-bit activations)" if self.eight_bit is UnsignedInt7Linear else ""

    @property
    def names(self) -> dict[str, str]:
        """Kind -> the product that was taken, for `/info`."""
        return {probe.kind: probe.best.name for probe in self.probes}


def choose(
    device: torch.device,
    dtype: torch.dtype,
    quantize: str,
    shape: tuple[int, int],
    mode: str = "auto",
    taken: Mapping[str, str] | None = None,
) -> Products:
    """The layers for a model whose widest product is `shape` [I, O].

    taken: kind -> the candidate that another process took (its `Products.names`). Where two are
    about as fast, the next process may take the other one, whose last bits differ.

    Raises UnsupportedError when `quantize` or what was taken cannot be had, or when it is
    int8-dynamic and no faster than float32 (unless `mode` allows it, or it was taken before).
    """
    taken = taken or {}
    quantization.check(quantize, device, dtype)
    if mode not in MODES:
        raise UnsupportedError(f"unknown products {mode!r}; known: {', '.join(MODES)}")
    if device.type != "cpu":
        return Products(dtype, nn.Linear, quantization.usual_layer(quantize))
    if mode == "plain":
        return Products(dtype, nn.Linear, PlainInt8Linear if quantize == "int8-dynamic" else None)
    kind = _name(dtype)
    floats = probe(kind, kind, *shape, only=taken.get(kind))
    linear = floats.best.layer
    if quantize != "int8-dynamic":
        return Products(dtype, linear, None, (floats,))
    eight = probe("int8", kind, *shape, only=taken.get("int8"))
    assert issubclass(eight.best.layer, ScaledLinear), eight
    if mode != "allow-slow" and "int8" not in taken:
        _refuse_slow(eight, probe("float32", "float32", *shape))
    return Products(dtype, linear, eight.best.layer, (floats, eight))


def _refuse_slow(eight: Probe, exact: Probe) -> None:
    """By the many rows of a batch: with few, the calls take longer than the products."""
    if eight.seconds[1] * _WORTHWHILE <= exact.seconds[1]:
        return
    times = ", ".join(
        f"{1e3 * slow:.2f} in place of {1e3 * fast:.2f} ms with {rows} rows"
        for rows, slow, fast in zip((_FEW, _MANY), eight.seconds, exact.seconds, strict=True)
    )
    raise UnsupportedError(
        f"int8-dynamic is no faster than float32 on this processor ({times}): leave --quantization "
        "out, or take it for its memory with --cpu-products allow-slow"
    )


def fastest_dtype(shape: tuple[int, int], mode: str = "auto") -> torch.dtype:
    """bfloat16 where its products are clearly faster than float32's on this processor."""
    if mode == "plain":
        return torch.bfloat16 if resources.has_bfloat16() else torch.float32
    half, exact = (probe(kind, kind, *shape) for kind in ("bfloat16", "float32"))
    return torch.bfloat16 if half.faster_than(exact) >= _PREFERRED else torch.float32


def probe(kind: str, dtype: str, inputs: int, outputs: int, *, only: str | None = None) -> Probe:
    """Try the candidates of `kind` on activations of `dtype` and a weight [outputs, inputs].

    Once in a process for each kind, shape and number of threads; torch's number of threads and
    its random state stay as they are. only: the name of the one candidate that may be taken.

    Raises UnsupportedError when that one is unknown or proves wrong.
    """
    shape = min(inputs, _LARGEST), min(outputs, _LARGEST)
    return _probe(kind, dtype, *shape, torch.get_num_threads(), only)


@lru_cache(maxsize=32)
def _probe(
    kind: str, dtype: str, inputs: int, outputs: int, threads: int, only: str | None
) -> Probe:
    candidates = [c for c in CANDIDATES[kind] if only in (None, c.name)]
    attempts = [_Attempt(candidate, getattr(torch, dtype)) for candidate in candidates]
    with torch.inference_mode():
        for attempt in attempts:
            attempt.prove(3)
        _time(attempts, *_TINY)  # so that a reference kernel is gone before it costs seconds
        for attempt in attempts:
            attempt.seconds.clear()
            attempt.prove(1, 64, 300)
        for rows in (_FEW, _MANY):
            _time(attempts, rows, inputs, outputs)
    right = [attempt for attempt in attempts if not attempt.trouble]
    if not right:
        why = attempts[0].trouble if attempts else "there is no such product"
        raise UnsupportedError(f"{kind} by {only}, taken before: {why}")
    best = _fastest(right)
    few, many = best.seconds
    trials = tuple(Trial(a.candidate.name, tuple(a.seconds), a.trouble) for a in attempts)
    return Probe(kind, best.candidate, (few, many), trials)


class _Attempt:
    """A candidate while it is tried: what it took so far, and why it is out, if it is."""

    def __init__(self, candidate: Candidate, dtype: torch.dtype) -> None:
        self.candidate, self.dtype = candidate, dtype
        self.seconds: list[float] = []
        self.trouble = ""

    def prove(self, *rows: int) -> None:
        """Products of these numbers of rows against float64: kernels tell them apart, and a layout
        is made for some of them. For 8 bits by the largest values, at which the sum of two
        products does not fit into 16 bits."""
        if self.trouble:
            return
        weight, activations = _waves(96, 160), _waves(max(rows), 160)
        if issubclass(self.candidate.layer, ScaledLinear):  # exact in 8 and in 7 bits
            weight, activations = (x.sign().mul_(127) for x in (weight, activations))
            weight[0], activations[::2] = 127, 127
        activations = activations.to(self.dtype)
        exact = activations.double() @ weight.to(self.dtype).double().T
        tolerance = exact.abs().max() * (1e-5 if self.dtype == torch.float32 else 1e-2)
        try:
            layer = layer_of(self.candidate.layer, weight, self.dtype)
            for count in rows:
                got = layer(activations[:count]).double()
                if not (got - exact[:count]).abs().max() <= tolerance:
                    self.trouble = "wrong on this processor"
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            self.trouble = f"cannot be had: {str(error).partition(chr(10))[0][:100]}"


def _time(attempts: list[_Attempt], rows: int, inputs: int, outputs: int) -> None:
    """Time those that are still in on x [rows, inputs] and W [outputs, inputs]; drop the slow.

    In turns, and the least counts: what else runs here makes single rounds slow.
    """
    weight, x = _waves(outputs, inputs), _waves(rows, inputs)
    timed = [
        (attempt, layer_of(attempt.candidate.layer, weight, attempt.dtype), x.to(attempt.dtype))
        for attempt in attempts
        if not attempt.trouble
    ]
    if not timed:
        return
    for attempt, layer, activations in timed:
        layer(activations)  # warms up
        attempt.seconds.append(_seconds(layer, activations))
    most = max(_DROPPED * min(attempt.seconds[-1] for attempt, *_ in timed), _NOTHING)
    for attempt, layer, activations in timed:
        started = time.perf_counter()
        while attempt.seconds[-1] > most and time.perf_counter() - started < _PATIENCE_S:
            attempt.seconds[-1] = min(attempt.seconds[-1], _seconds(layer, activations))
        if attempt.seconds[-1] > most:
            attempt.trouble = f"{_DROPPED * attempt.seconds[-1] / most:.0f} times the best"
    left = [one for one in timed if not one[0].trouble]
    started, rounds = time.perf_counter(), 1
    while rounds < _ROUNDS or time.perf_counter() - started < _LEAST_S:
        for attempt, layer, activations in left:
            attempt.seconds[-1] = min(attempt.seconds[-1], _seconds(layer, activations))
        rounds += 1


def _seconds(layer: nn.Module, x: Tensor) -> float:
    started = time.perf_counter()
    layer(x)
    return time.perf_counter() - started


def _fastest(attempts: list[_Attempt]) -> _Attempt:
    """The fastest by the mean over few and many rows; each has to beat those before it."""
    best, *others = attempts
    for other in others:
        ratio = math.sqrt(math.prod(best.seconds) / math.prod(other.seconds))
        if ratio >= other.candidate.margin:
            best = other
    return best


def layer_of(kind: type[nn.Module], weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A layer of `kind` with this float32 weight [O, I], without bias."""
    outputs, inputs = weight.shape
    if issubclass(kind, ScaledLinear):
        eight_bit = kind(inputs, outputs)
        for name, parameter in quantization.parameters_of(
            eight_bit, [weight], outputs, weight.device
        ):
            setattr(eight_bit, name, parameter)
        return eight_bit
    plain = nn.Linear(inputs, outputs, bias=False, device="meta")
    parameter = nn.Parameter(weight.to(dtype), requires_grad=False)
    if not issubclass(kind, PackedLinear):
        plain.weight = parameter
        return plain
    layer = kind(plain)
    layer.weight = layer.packed(parameter)
    return layer


def _waves(rows: int, columns: int) -> Tensor:
    """Float32 numbers [rows, columns] that differ, and nobody's random state touched."""
    places = torch.arange(rows * columns, dtype=torch.float32, device="cpu")
    return places.mul_(0.7).sin_().view(rows, columns)


def _has_mkl() -> bool:
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
