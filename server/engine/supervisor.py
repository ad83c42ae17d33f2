"""Starts, watches and restarts the engine workers. One per device.

Reports to a `WorkerEvents` what happened; knows nothing of queues, requests or futures, and never
decides what becomes of a batch. What a worker says is checked here: one that says what cannot be is
ended, as one that dies, and a handler that fails costs its worker and nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import logging
import re
import signal
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
from server.engine import devices
from server.engine.wire import HEADER, Fault, Kind, batch_frame, read_rows, rows_size, start_frame
from server.errors import StartError

logger = logging.getLogger("nv_embed.supervisor")

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the 1st, 2nd, … start in a row that does not become ready."""
_STOP_S = 1.0
"""How long a worker may take to end after its socket has closed; nobody awaits it any more."""
_KILLED_S = 10.0
"""How long it may take after it was killed: the kernel frees its memory first. Its successor would
find its device full."""
_SAME = 3
"""So many failures in a row for the same reason, and there is no point in another try."""
_PASSES = frozenset((errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE))
"""Errors for want of what others have for the moment."""
_DEADLY_BY_ITSELF = frozenset(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
)
"""Signals that a process earns by its own doing; others send it the rest."""
_LOAD_S = 60.0
_LOAD_BYTES_PER_S = 20e6
"""How long a worker may take to become ready: to import torch, and to read the checkpoint from a
slow disk. At the next try in a row it is twice as long, then three times."""
_MOST_TEXT = 1 << 20
"""Bytes of a greeting, a refusal or a failure."""


class _UselessWorkerError(Exception):
    """This worker will do no work; the message tells why."""


class _RefusedError(_UselessWorkerError):
    """It says so itself, and ends; `passes`: for want of what others have for the moment."""

    def __init__(self, message: str, passes: bool) -> None:
        super().__init__(f"cannot start: {message}")
        self.message, self.passes = message, passes


@dataclasses.dataclass(slots=True)
class _Life:
    """How the life of a worker went."""

    was_ready: bool = False
    reason: str | None = None  # why it could not start; None: by no fault of its own


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
        self._reasons: dict[int, list[str]] = {}  # slot -> the same one, in a row
        self._stopping = False
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
        """Close the sockets, wait for the workers to end, kill those that do not, and leave behind
        those that cannot be killed: they end with this process, or when their device lets them."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep_alive(self, slot: int) -> None:
        failures = 0
        while True:
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            life = _Life()
            try:
                await self._run_once(slot, self._load_timeout * (failures + 1), life)
            except StartError:
                raise
            except Exception:  # a fault of ours, in whoever handles the events
                logger.exception("worker %d: an event could not be handled", slot)
                life.was_ready = False
            failures = 0 if life.was_ready else failures + 1
            self._give_up_if_hopeless(slot, life.reason)

    def _give_up_if_hopeless(self, slot: int, reason: str | None) -> None:
        """Raises StartError when no worker was ever ready and each fails for the same reason, again
        and again. One that still loads may yet serve; and once the server has served, it stays."""
        known = self._reasons.setdefault(slot, [])
        if reason is None or (known and _without_numbers(known[-1]) != _without_numbers(reason)):
            known.clear()
        if reason is not None:
            known.append(reason)
            del known[:-_SAME]
        all_known = [self._reasons.get(other, []) for other in range(len(self._options))]
        if not self._was_ready and all(len(reasons) >= _SAME for reasons in all_known):
            last = "; ".join(sorted({reasons[-1] for reasons in all_known}))
            raise StartError(f"{last} (the same {_SAME} times in a row)")

    async def _run_once(self, slot: int, load_timeout: float, life: _Life) -> None:
        """One worker's whole life."""
        options = self._options[slot]
        device, environment = devices.in_child(options.device, devices.child_environment())
        try:
            process, reader, writer = await _start(environment)
            told = dataclasses.replace(options, device=device)
            writer.write(start_frame(told, self._runner, self._log_format, self._log_level))
        except OSError as error:  # out of processes, files or memory
            self.trouble[slot] = "its worker cannot be started"
            logger.error("worker %d cannot be started: %s", slot, error)
            if error.errno not in _PASSES:
                life.reason = f"a worker cannot be started: {error}"
            return
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
            self._was_ready = life.was_ready = True
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
                life.reason = None if error.passes else error.message
        finally:
            writer.transport.abort()  # close would wait for what it does not read
            self.trouble[slot] = trouble or "its worker is ending"
            try:
                if worker is not None:
                    self._events.worker_lost(worker)
            finally:
                status = await _reap(process, patience, _STOP_S if self._stopping else _KILLED_S)
                if status is None:
                    logger.error(
                        "worker %d cannot be killed: its device may have to be reset", slot
                    )
        self.trouble[slot] = trouble or f"its worker ended ({_describe(status)})"
        if worker is None and not trouble and _is_its_own_doing(status):
            life.reason = f"a worker ended before it was ready ({_describe(status)})"
        logger.error(
            "worker %d ended (%s) %s; starting it again",
            slot,
            _describe(status),
            "while serving" if worker else "before it was ready",
        )

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
                passes = bool(refusal.get("passes"))
            elif kind is Kind.HELLO:
                hello = orjson.loads(payload)
                info = RunnerInfo(**hello["info"])
                tokens_per_s = float(hello["tokens_per_s"])
                final, passes, message = True, False, self._objection(info)
            else:
                raise ValueError(kind)
        except (ValueError, TypeError, KeyError):
            raise _UselessWorkerError("sent what is no greeting") from None
        device = self._options[slot].device
        if devices.uuid_of(device):  # each calls its own cuda:0
            if message:
                message = f"{device}: {message}"
            else:
                info = dataclasses.replace(info, device=device)
        if message:
            if final and not self._was_ready:
                raise StartError(message)
            raise _RefusedError(message, passes)
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


async def _start(
    environment: Mapping[str, str],
) -> tuple[subprocess.Popen[bytes], asyncio.StreamReader, asyncio.StreamWriter]:
    """A new worker process and our end of its socket. Raises OSError."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            process = _spawn(theirs.fileno(), environment)
    except BaseException:
        ours.close()
        raise
    try:
        return process, *await asyncio.open_connection(sock=ours)
    except BaseException:
        ours.close()
        await _reap(process, 0.0, _STOP_S)
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


def _spawn(fd: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # -P: a server.py or model.py in the working directory is not what we mean.
    command = [sys.executable, "-P", "-m", "server.engine.start_worker", str(fd)]
    return subprocess.Popen(  # noqa: S603
        command,
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        env=environment,
        # Ctrl-C and a closing terminal are told to the front alone, which then drains.
        start_new_session=True,
    )


async def _reap(process: subprocess.Popen[bytes], patience: float, killed: float) -> int | None:
    """Wait for the process, whose socket is closed; kill it when it takes too long. None when even
    that does not end it in time, which the kernel does when a device no longer answers."""
    try:
        await _ended(process, patience)
    finally:  # also when nobody wants to wait any more
        if process.returncode is None:
            process.kill()
    return await _ended(process, killed)


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


def _is_its_own_doing(status: int | None) -> bool:
    return status is not None and (status >= 0 or -status in _DEADLY_BY_ITSELF)


def _without_numbers(message: str) -> str:
    """Equal for messages that differ in an address or in how much memory is free."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", message)


def load_timeout_of(weights: int) -> float:
    """Seconds that a worker may take to become ready with so many bytes of weights."""
    return _LOAD_S + weights / _LOAD_BYTES_PER_S
