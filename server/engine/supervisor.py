"""Starts, watches and restarts the engine workers. One per device.

Reports to a `WorkerEvents` what happened; knows nothing of queues, requests or futures, and never
decides what becomes of a batch. A worker that says what cannot be is ended, as one that dies is
replaced, and a handler that fails costs its worker and nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from model.batch import BatchLimits, RunnerInfo, RunnerOptions
from server.engine import devices, worker_process
from server.engine.metrics import Death
from server.engine.wire import POISONED, start_frame
from server.engine.worker_link import (
    RefusedError,
    UselessWorkerError,
    Worker,
    WorkerEvents,
    greeting,
    relay,
)
from server.engine.worker_process import KILLED_S, STOP_S
from server.errors import StartError

logger = logging.getLogger("nv_embed.supervisor")

_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the 1st, 2nd, … start in a row that does not become ready."""
_HOPELESS_AFTER = 3
"""So many failures in a row for the same reason, and there is no point in another try."""
_LOAD_S = 60.0
_LOAD_BYTES_PER_S = 20e6
"""How long a worker may take to become ready: to import torch, and to read the checkpoint from a
slow disk. At the next try in a row it is twice as long, then three times."""


@dataclasses.dataclass(slots=True)
class _Life:
    """How the life of a worker went."""

    worker: Worker | None = None  # once it is ready
    was_ready: bool = False
    trouble: str = ""  # in words for whoever asks why it does not serve
    reason: str | None = None  # why it could not start; None: by no fault of its own
    patience: float = 0.0  # seconds that it may take to end by itself


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
        min_ready: int = 1,
        most_failures: int | None = None,
    ) -> None:
        """width: of the vectors that a worker must promise. load_timeout: see `load_timeout_of`.
        most_failures: starts that a worker may fail in a row before it counts as lost for good,
        while there are others for `min_ready`; None: any number, once the server has served."""
        self._options, self._events = options, events
        self._width, self._load_timeout = width, load_timeout
        self._runner, self._log_format, self._log_level = runner, log_format, log_level
        self._tasks: list[asyncio.Task[None]] = []
        self._was_ready = False
        self._settled: dict[int, RunnerInfo] = {}  # slot -> what its last worker was
        self._reasons: dict[int, list[str]] = {}  # slot -> the same one, in a row
        self._min_ready, self._most_failures = min_ready, most_failures
        self._failures = [0] * len(options)  # of each slot, in a row
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
        while True:
            failures = self._failures[slot]
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            life = _Life()
            try:
                await self._run_once(slot, self._load_timeout * (failures + 1), life)
            except StartError:
                raise
            except Exception:  # a fault of ours, in whoever handles the events
                logger.exception("worker %d: an event could not be handled", slot)
                life.was_ready = False
            self._failures[slot] = 0 if life.was_ready else failures + 1
            self._give_up_if_hopeless(slot, life.reason)
            self._give_up_if_too_few(slot)

    def _give_up_if_hopeless(self, slot: int, reason: str | None) -> None:
        """Raises StartError when no worker was ever ready and each fails for the same reason, again
        and again. One that still loads may yet serve; and once the server has served, it stays."""
        known = self._reasons.setdefault(slot, [])
        if reason is None or (known and _without_numbers(known[-1]) != _without_numbers(reason)):
            known.clear()
        if reason is not None:
            known.append(reason)
            del known[:-_HOPELESS_AFTER]
        all_known = [self._reasons.get(other, []) for other in range(len(self._options))]
        if not self._was_ready and all(len(reasons) >= _HOPELESS_AFTER for reasons in all_known):
            last = "; ".join(sorted({reasons[-1] for reasons in all_known}))
            raise StartError(f"{last} (the same {_HOPELESS_AFTER} times in a row)")

    def _give_up_if_too_few(self, slot: int) -> None:
        """Raises StartError when so many workers are lost for good that too few are left: whoever
        runs this process may have another machine for it."""
        if self._most_failures is None:
            return
        left = sum(failures < self._most_failures for failures in self._failures)
        if left < self._min_ready:
            raise StartError(
                f"worker {slot} has failed to start {self._failures[slot]} times in a row "
                f"({self.trouble[slot]}); {left} of {self._min_ready} workers are left"
            )

    async def _run_once(self, slot: int, load_timeout: float, life: _Life) -> None:
        """One worker's whole life."""
        options = self._options[slot]
        device, environment = devices.in_child(options.device, devices.child_environment())
        try:
            process, reader, writer = await worker_process.start(environment)
            told = dataclasses.replace(options, device=device, **self._chosen(slot))
            writer.write(start_frame(told, self._runner, self._log_format, self._log_level))
        except OSError as error:  # out of processes, files or memory
            self.trouble[slot] = "its worker cannot be started"
            logger.error("worker %d cannot be started: %s", slot, error)
            if error.errno not in worker_process.TEMPORARY:
                life.reason = f"a worker cannot be started: {error}"
            return
        try:
            await self._until_its_end(slot, load_timeout, life, process, reader, writer)
        finally:
            writer.transport.abort()  # close would wait for what it does not read
            self.trouble[slot] = life.trouble or "its worker is ending"
            try:
                if life.worker is not None:
                    self._events.worker_lost(life.worker)
            finally:
                killed = STOP_S if self._stopping else KILLED_S
                status = await worker_process.reap(process, life.patience, killed)
                if status is None:
                    logger.error(
                        "worker %d cannot be killed: its device may have to be reset", slot
                    )
        self._tell_end(slot, life, status)

    def _chosen(self, slot: int) -> dict[str, Any]:
        """What the slot's last worker chose by timing: another choice would be other vectors for
        the same text. Not after one that did not start with it: the choice may be why."""
        info = self._settled.pop(slot, None)
        if info is None or info.device != "cpu":
            return {}
        return {"dtype": info.dtype, "products": info.products}

    async def _until_its_end(
        self,
        slot: int,
        load_timeout: float,
        life: _Life,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """From its greeting to its last answer; `life` gets how it went."""
        options, started = self._options[slot], time.monotonic()
        try:
            async with asyncio.timeout(load_timeout):
                info, tokens_per_s = await self._greet(slot, reader)
            limits = BatchLimits(
                options.max_batch_tokens,
                options.max_batch_seqs,
                half_beside_query=info.device == "cpu",  # where it is measured
            )
            self._settled[slot] = info
            seconds = time.monotonic() - started
            life.worker = Worker(slot, info, limits, tokens_per_s, writer, process, seconds)
            self.trouble.pop(slot, None)
            self._was_ready = life.was_ready = True
            life.patience = STOP_S
            self._events.worker_ready(life.worker)
            await relay(life.worker, reader, self._events)
        except (asyncio.IncompleteReadError, ConnectionError):
            life.patience = STOP_S  # it has gone, or is about to
        except TimeoutError:
            life.trouble = "its worker took too long to load"
            logger.error("worker %d was not ready after %.0f s: ending it", slot, load_timeout)
        except RefusedError as error:
            logger.error("worker %d %s", slot, error)
            life.trouble, life.patience = "its worker cannot start; see the log", STOP_S
            life.reason = None if error.temporary else error.message
        except UselessWorkerError as error:
            logger.error("worker %d %s", slot, error)
            if life.worker is not None:
                life.worker.killed_for = "nonsense"
            life.trouble, life.patience = "its worker sent nonsense; see the log", 0.0

    def _tell_end(self, slot: int, life: _Life, status: int | None) -> None:
        ended = worker_process.describe(status)
        self.trouble[slot] = life.trouble or f"its worker ended ({ended})"
        if not life.worker and not life.trouble and worker_process.is_its_own_doing(status):
            life.reason = f"a worker ended before it was ready ({ended})"
        self._events.worker_ended(_cause(life.worker, status))
        when = "while serving" if life.worker else "before it was ready"
        logger.error("worker %d ended (%s) %s; starting it again", slot, ended, when)

    async def _greet(self, slot: int, reader: asyncio.StreamReader) -> tuple[RunnerInfo, float]:
        """Wait for HELLO. Raises StartError when no worker was ever ready and this one says that
        it never can be: once the server has served, a lost device must not end it."""
        started = time.monotonic()
        device = self._options[slot].device
        has_uuid = devices.uuid_of(device) is not None  # each calls its own cuda:0
        try:
            info, tokens_per_s = await greeting(reader)
            if self._width not in (None, info.width):
                message = (
                    f"its vectors have {info.width} values, and config.json says {self._width}"
                )
                raise RefusedError(message, final=True, temporary=False)
        except RefusedError as refusal:
            message = f"{device}: {refusal.message}" if has_uuid else refusal.message
            if refusal.final and not self._was_ready:
                raise StartError(message) from None
            raise RefusedError(message, final=refusal.final, temporary=refusal.temporary) from None
        if has_uuid:
            info = dataclasses.replace(info, device=device)
        properties = [info.device_name, info.dtype, info.quantization, info.attention]
        properties += ["CUDA graphs"] if info.cuda_graphs else []
        properties += [f"{info.fused_kernels} kernels"] if info.fused_kernels != "plain" else []
        properties += [f"{kind} by {who}" for kind, who in info.products.items()]
        logger.info(
            "worker %d is ready after %.1f s on %s (%s)",
            slot,
            time.monotonic() - started,
            info.device,
            ", ".join(properties),
        )
        return info, tokens_per_s


def _cause(worker: Worker | None, status: int | None) -> Death | None:
    """Of which it died; None: it was never ready."""
    if worker is None:
        return None
    return worker.killed_for or ("device" if status == POISONED else "crash")


def _without_numbers(message: str) -> str:
    """Equal for messages that differ in an address or in how much memory is free."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", message)


def load_timeout_of(weights: int) -> float:
    """Seconds that a worker may take to become ready with so many bytes of weights."""
    return _LOAD_S + weights / _LOAD_BYTES_PER_S
