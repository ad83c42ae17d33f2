"""Starts, watches and restarts the engine workers. One per device.

Reports to a `WorkerEvents` what happened; knows nothing of queues, requests or futures, and never
decides what becomes of a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from model.batch import BatchLimits, Encoding, RunnerInfo, RunnerOptions
from server.errors import StartError
from server.worker import HEADER, Fault, Kind, batch_frame, read_rows, start_frame

logger = logging.getLogger("nv_embed.supervisor")

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the 1st, 2nd, … start in a row that does not become ready."""
_PROBE_S = 120.0
_SECRETS = frozenset(
    ("NV_EMBED_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
)
"""Variables that a worker has no use for: it neither asks for keys nor downloads."""
_STOP_S = 1.0
"""How long a worker may take to end after its socket has closed; nobody awaits it any more."""


class WorkerEvents(Protocol):
    def worker_ready(self, worker: Worker) -> None: ...

    def worker_lost(self, worker: Worker) -> None:
        """It died: whatever it had in hand will not be answered."""
        ...

    def batch_done(
        self,
        worker: Worker,
        batch_id: int,
        rows: NDArray[np.float32],
        faults: Mapping[int, Fault],
    ) -> None:
        """`rows` [N, D]; `faults` tells which of them are no vectors, and why."""
        ...

    def batch_failed(self, worker: Worker, batch_id: int) -> None: ...


class Worker:
    """A live, ready worker. `batches_out` belongs to whoever hands batches over."""

    def __init__(
        self,
        slot: int,
        info: RunnerInfo,
        limits: BatchLimits,
        writer: asyncio.StreamWriter,
        process: subprocess.Popen[bytes],
    ) -> None:
        self.slot, self.info, self.limits = slot, info, limits
        self._writer, self._process = writer, process

    def __repr__(self) -> str:
        return f"Worker({self.slot}, {self.info.device})"

    @property
    def is_cuda(self) -> bool:
        return self.info.device.startswith("cuda")

    def send(self, batch_id: int, encodings: Sequence[Encoding]) -> None:
        """Hand a batch over. Never blocks and never fails: a dead worker is reported as lost."""
        self._writer.write(batch_frame(batch_id, encodings))

    def kill(self) -> None:
        """End it at once; it is then reported as lost."""
        self._process.kill()


class Supervisor:
    """Keeps one worker alive for each of `options`."""

    def __init__(
        self,
        options: Sequence[RunnerOptions],
        events: WorkerEvents,
        *,
        runner: str | None = None,
        log_format: str = "text",
        log_level: str = "info",
    ) -> None:
        self._options, self._events = options, events
        self._runner, self._log_format, self._log_level = runner, log_format, log_level
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._was_ready = False
        self.trouble: dict[int, str] = {}
        """Slot -> why its worker is not ready."""

    def start(self) -> None:
        for slot in range(len(self._options)):
            self.trouble[slot] = "loading the model"
            self._tasks.append(asyncio.create_task(self._keep_alive(slot), name=f"worker-{slot}"))

    async def failed(self) -> None:
        """Wait until a worker cannot start for good; raises its StartError."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def stop(self) -> None:
        """Close the sockets, wait for the workers to end, kill those that do not."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_alive(self, slot: int) -> None:
        failures = 0
        while True:
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            was_ready = await self._run_once(slot)
            failures = 0 if was_ready else failures + 1

    async def _run_once(self, slot: int) -> bool:
        """One worker's whole life. Returns whether it was ever ready."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                process = self._processes[slot] = _spawn(theirs.fileno())
        except OSError as error:  # out of processes, files or memory
            self.trouble[slot] = "its worker cannot be started"
            logger.error("worker %d cannot be started: %s", slot, error)
            return False
        reader, writer = await asyncio.open_connection(sock=ours)
        worker = None
        try:
            options = self._options[slot]
            writer.write(start_frame(options, self._runner, self._log_format, self._log_level))
            worker = await self._greet(slot, reader, writer)
            self.trouble.pop(slot, None)
            self._was_ready = True
            self._events.worker_ready(worker)
            await self._relay(worker, reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker has gone
        finally:
            if worker is not None:
                self._events.worker_lost(worker)
            writer.close()
            status = await _reap(process, patience=_STOP_S if worker else 0.0)
            self._processes.pop(slot, None)
        self.trouble.setdefault(slot, f"its worker ended ({_describe(status)})")
        logger.error(
            "worker %d ended (%s) %s; starting it again",
            slot,
            _describe(status),
            "while serving" if worker else "before it was ready",
        )
        return worker is not None

    async def _greet(
        self, slot: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Worker:
        """Wait for HELLO. Raises StartError when no worker was ever ready and this one says that
        it never can be: once the server has served, a lost device must not end it."""
        started = time.monotonic()
        kind, _, _, _, payload = await _receive(reader)
        if kind is Kind.REFUSED:
            why = orjson.loads(payload)
            if why["final"] and not self._was_ready:
                raise StartError(why["message"])
            self.trouble[slot] = "its worker cannot start; see the log"
            logger.error("worker %d cannot start: %s", slot, why["message"])
            raise ConnectionResetError
        assert kind is Kind.HELLO, kind
        info = RunnerInfo(**orjson.loads(payload))
        options = self._options[slot]
        how = [info.device_name, info.dtype, info.quantization, info.attention]
        how += ["CUDA graphs"] if info.cuda_graphs else []
        how += [f"{kind} by {who}" for kind, who in info.products.items()]
        logger.info(
            "worker %d is ready after %.1f s on %s (%s)",
            slot,
            time.monotonic() - started,
            info.device,
            ", ".join(how),
        )
        limits = BatchLimits(options.max_batch_tokens, options.max_batch_seqs)
        return Worker(slot, info, limits, writer, self._processes[slot])

    async def _relay(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        while True:
            kind, batch_id, rows, faults, payload = await _receive(reader)
            if kind is Kind.ROWS:
                self._events.batch_done(worker, batch_id, *read_rows(rows, faults, payload))
            else:
                assert kind is Kind.FAILED, kind
                logger.error("worker %d: a batch failed: %s", worker.slot, payload.decode())
                self._events.batch_failed(worker, batch_id)


async def _receive(reader: asyncio.StreamReader) -> tuple[Kind, int, int, int, bytes]:
    kind, batch_id, rows, faults, size = HEADER.unpack(await reader.readexactly(HEADER.size))
    return Kind(kind), batch_id, rows, faults, await reader.readexactly(size)


def _spawn(fd: int) -> subprocess.Popen[bytes]:
    # -P: a server.py or model.py in the working directory is not what we mean.
    command = [sys.executable, "-P", "-m", "server.worker", str(fd)]
    return subprocess.Popen(  # noqa: S603
        command, pass_fds=[fd], stdin=subprocess.DEVNULL, env=_child_environment()
    )


def _child_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


async def _reap(process: subprocess.Popen[bytes], patience: float) -> int:
    """Wait for the process, whose socket is closed; kill it when it takes too long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return await asyncio.to_thread(process.wait, patience)
    process.kill()
    return await asyncio.to_thread(process.wait)


def _describe(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status}"


def probe_cuda_devices() -> int:
    """How many CUDA devices torch sees; asked in a child, since the front never imports torch.

    Without NVIDIA's driver the answer is 0 at once.
    """
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap")):
        return 0
    command = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        answer = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_PROBE_S,
            env=_child_environment(),
        )
        count = int(answer.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.warning("asking torch for CUDA devices failed: %s %s", error, _errors_of(error))
        count = 0
    if not count:
        logger.warning("NVIDIA's driver is here, and torch sees no CUDA device: using the CPU")
    return count


def _errors_of(error: Exception) -> str:
    return error.stderr or "" if isinstance(error, subprocess.CalledProcessError) else ""


def worker_options(
    base: RunnerOptions, devices: Sequence[str], cores: int, max_batch_tokens: int | None
) -> list[RunnerOptions]:
    """One RunnerOptions per worker: its device, its share of the cores, its batch size."""
    if list(devices) == ["auto"]:
        count = probe_cuda_devices()
        devices = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    cpu_workers = sum(device == "cpu" for device in devices)
    share = max(1, cores // max(1, cpu_workers))
    return [
        dataclasses.replace(
            base,
            device=device,
            threads=base.threads or (share if device == "cpu" else None),
            max_batch_tokens=max_batch_tokens or (1024 if device == "cpu" else 8192),
        )
        for device in devices
    ]
