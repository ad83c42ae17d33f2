"""The engine worker process: loads a runner, and embeds one batch after another.

The front imports this module, too, so it imports torch nowhere: only the runner does, in the child.
A worker is a fresh interpreter (`server.engine.start_worker`) that is joined to the front by
one Unix socket. It does one batch after another and ends when the socket closes.

"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from numpy.typing import NDArray

from model.batch import RunnerOptions
from model.errors import ModelError
from model.fitting import FittingRunner, is_out_of_memory, loses_device
from model.platform import resources
from server import logs
from server.engine.wire import (
    HEADER,
    POISONED,
    Fault,
    Kind,
    frame,
    hello_frame,
    memory_frame,
    read_batch,
    refused_frame,
    rows_frame,
)

if TYPE_CHECKING:
    from model.runner import Runner

logger = logging.getLogger("nv_embed.worker")

MODEL_RUNNER = "model.runner:ModelRunner"
CPU_NICENESS = 3
"""CPU workers yield to the front, which has little to do and must do it at once."""
_LOOK_S = 1.0
"""Between two looks at the memory of a GPU: torch takes a tenth of a millisecond to say it."""
_MOST_SAID = 2000
"""Characters of an error's text."""
_PR_SET_PDEATHSIG = 1
_FLOAT8 = (8, 9)
"""The compute capability from which GPUs multiply float8."""


def load_factory(name: str) -> Callable[[RunnerOptions], Runner]:
    """The callable behind `module:attribute`."""
    module, _, attribute = name.partition(":")
    factory: Callable[[RunnerOptions], Runner] = getattr(importlib.import_module(module), attribute)
    return factory


class _Connection:
    """Blocking frames over the worker's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = sock.makefile("rb", buffering=1 << 16)
        self._socket = sock

    def receive(self) -> tuple[Kind, int, int, bytes]:
        """-> (kind, batch id, rows, payload). Raises EOFError when the front has gone."""
        kind, batch_id, rows, _, size = HEADER.unpack(self._read(HEADER.size))
        return Kind(kind), batch_id, rows, self._read(size)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def _read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        if len(data) < size:
            raise EOFError
        return data


def main(fd: int) -> int:
    """Serve batches until the socket closes; returns the exit status."""
    _outlive_nobody()
    connection = _Connection(socket.socket(fileno=fd))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _, _, _, payload = connection.receive()
        start = orjson.loads(payload)
        logs.configure(start["log_format"], start["log_level"])
        runner = _start_runner(connection, start)
        if runner is None:
            return 1
        try:
            return _serve(connection, runner)
        finally:
            runner.close()
    return 0


def _outlive_nobody() -> None:
    """Stop signals are the front's business; when the front dies, so does this process."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _start_runner(connection: _Connection, start: dict[str, Any]) -> Runner | None:
    options = RunnerOptions(**start["options"])
    if options.device == "cpu":
        os.nice(CPU_NICENESS)
    try:
        with resources.for_good():
            factory = load_factory(start["runner"] or MODEL_RUNNER)
        runner = factory(options)
        tokens_per_s = float(runner.warm_up() or 0.0)
    except Exception as error:
        final, temporary, message = True, False, f"{error}"
        if is_out_of_memory(error):
            message = f"{options.device} has too little memory to load and run the model: "
            message += less_memory(options)
        elif "can't start new thread" in message:
            final, temporary = False, True
            message += ", for want of processes or of address space (ulimit -u, ulimit -v)"
        elif not isinstance(error, ModelError):  # those are the same at the next try
            final, message = False, repr(error)[:_MOST_SAID]
            if not isinstance(error, ImportError | OSError):  # whose cause is not in our code
                logger.exception("the worker cannot start")
        connection.send(refused_frame(message, final=final, temporary=temporary))
        return None
    connection.send(hello_frame(runner.info, tokens_per_s))
    return runner


def less_memory(options: RunnerOptions) -> str:
    """What an operator can do where the model does not fit."""
    ways = "lower --max-input-tokens or --max-batch-tokens"
    smaller = ["int8-dynamic"]
    if options.device.startswith("cuda"):
        smaller = ["float8", "int8"] if _capability(options.device) >= _FLOAT8 else ["int8"]
    if options.quantization == "none":
        ways += f", or take --quantization {' or '.join(smaller)}"
    return ways


def _capability(device: str) -> tuple[int, int]:
    """Of a GPU; (0, 0) when it does not tell."""
    with contextlib.suppress(Exception):
        major, minor = sys.modules["torch"].cuda.get_device_capability(device)
        return major, minor
    return 0, 0


def _serve(connection: _Connection, runner: Runner) -> int:
    fitting, memory = FittingRunner(runner), _Memory(runner.info.device)
    while True:
        kind, batch_id, count, payload = connection.receive()
        assert kind is Kind.BATCH, kind
        try:
            rows, too_large = fitting.embed(read_batch(count, payload))
            answer = rows_frame(batch_id, rows, _faults(rows, too_large))
        except Exception as error:
            logger.exception("a batch of %d inputs failed", count)
            if loses_device(error) or not _device_answers(runner.info.device):
                return POISONED
            said = repr(error)[:_MOST_SAID].encode(errors="replace")
            answer = frame(Kind.FAILED, said, batch_id=batch_id)
        connection.send(memory.news(fitting.splits) + answer)


class _Memory:
    """What there is to tell of it, if that has changed."""

    def __init__(self, device: str) -> None:
        self._device = device if device.startswith("cuda") else None
        self._splits = self._bytes = 0
        self._next_look = 0.0

    def news(self, splits: int) -> bytes:
        """A frame, or nothing. splits: so far."""
        held, new = self._bytes, splits - self._splits
        torch = sys.modules.get("torch")
        if self._device and torch is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_S
            with contextlib.suppress(Exception):  # no reason to fail a batch
                held = int(torch.cuda.memory_reserved(self._device))
        if not new and held == self._bytes:
            return b""
        self._splits, self._bytes = splits, held
        return memory_frame(new, held)


def _device_answers(device: str) -> bool:
    """Whether what was launched on it has ended well. An error of a library does not tell whether
    its device can still be used."""
    torch = sys.modules.get("torch")
    if torch is None or not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
    except Exception as error:
        logger.error("%s cannot be used any more: %s", device, error)
        return False
    return True


def _faults(rows: NDArray[np.float32], too_large: Sequence[int]) -> dict[int, Fault]:
    faults = dict.fromkeys(too_large, Fault.NO_MEMORY)
    for index in np.flatnonzero(~np.isfinite(rows).all(axis=1)).tolist():
        faults[index] = Fault.NOT_FINITE
    return faults
