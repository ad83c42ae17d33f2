"""Starts, watches and restarts the engine workers. One per device.

Reports to a `WorkerEvents` what happened; knows nothing of queues, requests or futures, and never
decides what becomes of a batch. What a worker says is checked here: one that says what cannot be is
ended, as one that dies, and a handler that fails costs its worker and nothing else.
"""

from __future__ import annotations

import asyncio
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
from server.engine.worker import HEADER, Fault, Kind, batch_frame, read_rows, rows_size, start_frame
from server.errors import StartError

logger = logging.getLogger("nv_embed.supervisor")

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the 1st, 2nd, … start in a row that does not become ready."""
_PROBE_S = 120.0
_SECRETS = frozenset(
    ("NV_EMBED_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
)
"""Variables that a worker has no use for: it neither asks for keys nor downloads."""
_STOP_S = 1.0
"""How long a worker may take to end after its socket has closed, and after it was killed; nobody
awaits it any more."""
_LOAD_S = 60.0
_LOAD_BYTES_PER_S = 20e6
"""How long a worker may take to become ready: to import torch, and to read the checkpoint from a
slow disk. At the next try in a row it is twice as long, then three times."""
_MOST_TEXT = 1 << 20
"""Bytes of a greeting, a refusal or a failure."""


class _UselessWorkerError(Exception):
    """This worker will do no work; the message tells why."""


class _RefusedError(_UselessWorkerError):
    """It says so itself, and ends."""


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
    """A live, ready worker. It knows which batches it has, and not what is in them."""

    def __init__(
        self,
        slot: int,
        info: RunnerInfo,
        limits: BatchLimits,
        tokens_per_s: float,
        writer: asyncio.StreamWriter,
        process: subprocess.Popen[bytes],
    ) -> None:
        """tokens_per_s: what its warming up has shown; 0 when it has not."""
        self.slot, self.info, self.limits, self.tokens_per_s = slot, info, limits, tokens_per_s
        self._writer, self._process = writer, process
        self._due: dict[int, int] = {}  # batch id -> its rows

    def __repr__(self) -> str:
        return f"Worker({self.slot}, {self.info.device})"

    @property
    def is_cuda(self) -> bool:
        return self.info.device.startswith("cuda")

    @property
    def kind(self) -> str:
        """Equal for devices that are equally fast."""
        return f"{self.info.device.partition(':')[0]} {self.info.device_name}"

    def send(self, batch_id: int, encodings: Sequence[Encoding]) -> None:
        """Hand a batch over. Never blocks and never fails: a dead worker is reported as lost."""
        self._due[batch_id] = len(encodings)
        if not self._writer.is_closing():
            self._writer.write(batch_frame(batch_id, encodings))

    def settle(self, batch_id: int) -> int | None:
        """An answer to this batch has come: how many rows it must have. None: there is no such
        batch, or it was answered before."""
        return self._due.pop(batch_id, None)

    def kill(self) -> None:
        """End it at once; it is then reported as lost, even when the kernel cannot end it yet (a
        device that does not answer holds its process for as long as it likes)."""
        self._process.kill()
        self._writer.transport.abort()


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
        width: int | None = None,
        load_timeout: float = _LOAD_S,
    ) -> None:
        """width: of the vectors that a worker must promise. load_timeout: see `load_timeout_of`."""
        self._options, self._events = options, events
        self._width, self._load_timeout = width, load_timeout
        self._runner, self._log_format, self._log_level = runner, log_format, log_level
        self._tasks: list[asyncio.Task[None]] = []
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
            try:
                was_ready = await self._run_once(slot, self._load_timeout * (failures + 1))
            except StartError:
                raise
            except Exception:  # a fault of ours, in whoever handles the events
                logger.exception("worker %d: an event could not be handled", slot)
                was_ready = False
            failures = 0 if was_ready else failures + 1

    async def _run_once(self, slot: int, load_timeout: float) -> bool:
        """One worker's whole life. Returns whether it was ever ready."""
        options = self._options[slot]
        try:
            process, reader, writer = await _start()
            writer.write(start_frame(options, self._runner, self._log_format, self._log_level))
        except OSError as error:  # out of processes, files or memory
            self.trouble[slot] = "its worker cannot be started"
            logger.error("worker %d cannot be started: %s", slot, error)
            return False
        worker, trouble, patience = None, "", 0.0
        try:
            async with asyncio.timeout(load_timeout):
                info, tokens_per_s = await self._greet(slot, reader)
            limits = BatchLimits(
                options.max_batch_tokens,
                options.max_batch_seqs,
                half_beside_query=info.device == "cpu",  # where it is measured
            )
            worker = Worker(slot, info, limits, tokens_per_s, writer, process)
            self.trouble.pop(slot, None)
            self._was_ready = True
            patience = _STOP_S
            self._events.worker_ready(worker)
            await self._relay(worker, reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            patience = _STOP_S  # it has gone, or is about to
        except TimeoutError:
            trouble = "its worker took too long to load"
            logger.error("worker %d was not ready after %.0f s: ending it", slot, load_timeout)
        except _UselessWorkerError as error:
            logger.error("worker %d %s", slot, error)
            trouble, patience = "its worker sent nonsense; see the log", 0.0
            if isinstance(error, _RefusedError):
                trouble, patience = "its worker cannot start; see the log", _STOP_S
        finally:
            writer.transport.abort()  # close would wait for what it does not read
            try:
                if worker is not None:
                    self._events.worker_lost(worker)
            finally:
                status = await _reap(process, patience)
        self.trouble[slot] = trouble or f"its worker ended ({_describe(status)})"
        logger.error(
            "worker %d ended (%s) %s; starting it again",
            slot,
            _describe(status),
            "while serving" if worker else "before it was ready",
        )
        return worker is not None

    async def _greet(self, slot: int, reader: asyncio.StreamReader) -> tuple[RunnerInfo, float]:
        """Wait for HELLO. Raises StartError when no worker was ever ready and this one says that
        it never can be: once the server has served, a lost device must not end it."""
        started = time.monotonic()
        kind, *_, size = await _receive(reader)
        payload = await _text(reader, size)
        try:
            if kind is Kind.REFUSED:
                refusal = orjson.loads(payload)
                final, message = bool(refusal["final"]), str(refusal["message"])
            elif kind is Kind.HELLO:
                hello = orjson.loads(payload)
                info = RunnerInfo(**hello["info"])
                tokens_per_s = float(hello["tokens_per_s"])
                final, message = True, self._objection(info)
            else:
                raise ValueError(kind)
        except (ValueError, TypeError, KeyError):
            raise _UselessWorkerError("sent what is no greeting") from None
        if message:
            if final and not self._was_ready:
                raise StartError(message)
            raise _RefusedError(f"cannot start: {message}")
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
        return info, tokens_per_s

    def _objection(self, info: RunnerInfo) -> str:
        if self._width is None or info.width == self._width:
            return ""
        return f"its vectors have {info.width} values, and config.json says {self._width}"

    async def _relay(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        while True:
            kind, batch_id, rows, faults, size = await _receive(reader)
            due = worker.settle(batch_id)
            if due is None:
                raise _UselessWorkerError(f"answered batch {batch_id}, which it does not have")
            if kind is Kind.FAILED:
                text = await _text(reader, size)
                logger.error(
                    "worker %d: a batch failed: %s", worker.slot, text.decode(errors="replace")
                )
                self._events.batch_failed(worker, batch_id)
                continue
            expected = rows_size(due, worker.info.width, faults)
            if kind is not Kind.ROWS or rows != due or faults > due or size != expected:
                raise _UselessWorkerError(f"sent what is no answer to a batch of {due}")
            payload = await reader.readexactly(size)
            try:
                answer = read_rows(rows, faults, payload)
            except ValueError:
                raise _UselessWorkerError("sent an unknown fault") from None
            self._events.batch_done(worker, batch_id, *answer)


async def _start() -> tuple[subprocess.Popen[bytes], asyncio.StreamReader, asyncio.StreamWriter]:
    """A new worker process and our end of its socket. Raises OSError."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = _spawn(theirs.fileno())
    except BaseException:
        ours.close()
        raise
    try:
        return process, *await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        await _reap(process, 0.0)
        raise


async def _receive(reader: asyncio.StreamReader) -> tuple[Kind, int, int, int, int]:
    """A header: kind, batch id, rows, faults and the size of what follows."""
    kind, batch_id, rows, faults, size = HEADER.unpack(await reader.readexactly(HEADER.size))
    try:
        return Kind(kind), batch_id, rows, faults, size
    except ValueError:
        raise _UselessWorkerError("sent what is no frame") from None


async def _text(reader: asyncio.StreamReader, size: int) -> bytes:
    if size > _MOST_TEXT:
        raise _UselessWorkerError(f"has {size} bytes to say, which is too much")
    return await reader.readexactly(size)


def _spawn(fd: int) -> subprocess.Popen[bytes]:
    # -P: a server.py or model.py in the working directory is not what we mean.
    command = [sys.executable, "-P", "-m", "server.engine.start_worker", str(fd)]
    return subprocess.Popen(  # noqa: S603
        command,
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        env=_child_environment(),
        # Ctrl-C and a closing terminal are told to the front alone, which then drains.
        start_new_session=True,
    )


def _child_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


async def _reap(process: subprocess.Popen[bytes], patience: float) -> int | None:
    """Wait for the process, whose socket is closed; kill it when it takes too long. None when even
    that does not end it, which the kernel does when a device no longer answers."""
    if await _ended(process, patience) is None:
        process.kill()
        await _ended(process, _STOP_S)
    return process.returncode


async def _ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit status, if it ends in time. Takes neither a thread nor a file: both may be out."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return process.returncode


def _describe(status: int | None) -> str:
    if status is None:
        return "killed, and it does not end"
    return f"signal {-status}" if status < 0 else f"status {status}"


def load_timeout_of(weights: int) -> float:
    """Seconds that a worker may take to become ready with so many bytes of weights."""
    return _LOAD_S + weights / _LOAD_BYTES_PER_S


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
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
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
