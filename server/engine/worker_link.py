"""A worker as the front sees it: what it is told, and what it says, which is checked here.

One that says what cannot be does no more work, and its supervisor ends it. Knows frames, and
neither why a worker ends nor what becomes of a batch.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from model.batch import BatchLimits, Encoding, RunnerInfo
from server.engine.metrics import Death
from server.engine.wire import (
    HEADER,
    Fault,
    Kind,
    batch_frame,
    read_memory,
    read_rows,
    rows_size,
)

logger = logging.getLogger("nv_embed.supervisor")

_MOST_TEXT = 1 << 20
"""Bytes of a greeting, a refusal or a failure."""


class UselessWorkerError(Exception):
    """This worker will do no work; the message tells why."""


class RefusedError(UselessWorkerError):
    """It says so itself, and ends. final: no new try would help. temporary: for want of what others
    have for the moment."""

    def __init__(self, message: str, *, final: bool, temporary: bool) -> None:
        super().__init__(f"cannot start: {message}")
        self.message, self.final, self.temporary = message, final, temporary


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

    def memory_told(self, worker: Worker, splits: int, device_bytes: int) -> None:
        """How often it has halved a batch since it told the last time, and what it holds now."""
        ...

    def worker_ended(self, cause: Death | None) -> None:
        """Its process has ended; None: before it was ready."""
        ...


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
        start_seconds: float = 0.0,
    ) -> None:
        """tokens_per_s: what its warming up has shown; 0 when it has not."""
        self.slot, self.info, self.limits, self.tokens_per_s = slot, info, limits, tokens_per_s
        self._writer, self._process = writer, process
        self._due: dict[int, int] = {}  # batch id -> its rows
        self.start_seconds = start_seconds
        self.killed_for: Death | None = None

    def __repr__(self) -> str:
        return f"Worker({self.slot}, {self.info.device})"

    @property
    def pid(self) -> int:
        return self._process.pid

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

    def kill(self, cause: Death = "crash") -> None:
        """End it at once; it is then reported as lost, even when the kernel cannot end it yet (a
        device that does not answer holds its process for as long as it likes)."""
        self.killed_for = cause
        self._process.kill()
        self._writer.transport.abort()


async def greeting(reader: asyncio.StreamReader) -> tuple[RunnerInfo, float]:
    """Wait until the worker is ready. -> (what it runs, tokens a second; 0: unknown).

    Raises RefusedError when it cannot start, UselessWorkerError for what is no greeting.
    """
    kind, *_, size = await _receive(reader)
    payload = await _text(reader, size)
    try:
        said = orjson.loads(payload)
        if kind is Kind.HELLO:
            return RunnerInfo(**said["info"]), float(said["tokens_per_s"])
        if kind is not Kind.REFUSED:
            raise ValueError(kind)
        message, final = str(said["message"]), bool(said["final"])
        temporary = bool(said.get("temporary"))
    except (ValueError, TypeError, KeyError):
        raise UselessWorkerError("sent what is no greeting") from None
    raise RefusedError(message, final=final, temporary=temporary)


async def relay(worker: Worker, reader: asyncio.StreamReader, events: WorkerEvents) -> None:
    """Tell `events` of each answer, until the socket closes or an answer cannot be."""
    while True:
        kind, batch_id, rows, faults, size = await _receive(reader)
        if kind is Kind.MEMORY:
            payload = await _text(reader, size)
            try:
                events.memory_told(worker, rows, read_memory(payload))
            except ValueError:
                raise UselessWorkerError("sent what tells nothing of memory") from None
            continue
        due = worker.settle(batch_id)
        if due is None:
            raise UselessWorkerError(f"answered batch {batch_id}, which it does not have")
        if kind is Kind.FAILED:
            text = await _text(reader, size)
            logger.error(
                "worker %d: a batch failed: %s", worker.slot, text.decode(errors="replace")
            )
            events.batch_failed(worker, batch_id)
            continue
        expected = rows_size(due, worker.info.width, faults)
        if kind is not Kind.ROWS or rows != due or faults > due or size != expected:
            raise UselessWorkerError(f"sent what is no answer to a batch of {due}")
        payload = await reader.readexactly(size)
        try:
            answer = read_rows(rows, faults, payload)
        except ValueError:
            raise UselessWorkerError("sent an unknown fault") from None
        events.batch_done(worker, batch_id, *answer)


async def _receive(reader: asyncio.StreamReader) -> tuple[Kind, int, int, int, int]:
    """A header: kind, batch id, rows, faults and the size of what follows."""
    kind, batch_id, rows, faults, size = HEADER.unpack(await reader.readexactly(HEADER.size))
    try:
        return Kind(kind), batch_id, rows, faults, size
    except ValueError:
        raise UselessWorkerError("sent what is no frame") from None


async def _text(reader: asyncio.StreamReader, size: int) -> bytes:
    if size > _MOST_TEXT:
        raise UselessWorkerError(f"has {size} bytes to say, which is too much")
    return await reader.readexactly(size)
