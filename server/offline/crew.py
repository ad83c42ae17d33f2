"""Who writes the shards of a run: this process, or one process for each of several devices.

Shards are dealt in turn to whoever is free, and each is the same to the byte whoever writes it.
Knows nothing of how rows are read, nor of what becomes of the shards.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, NamedTuple, Protocol

from model.batch import RunnerInfo
from model.errors import CheckpointError, FileError, UnsupportedError
from model.platform import resources
from model.platform.resources import usable_cores
from server.engine.devices import in_child
from server.errors import SettingsError
from server.offline.job import Row
from server.offline.ledger import Ledger
from server.offline.manifest import Settled
from server.offline.parts import OutputError, SliceEnd, Written
from server.offline.places import InputFileError
from server.offline.reader import Input
from server.offline.shard_writer import Advance, Recipe, ShardWriter
from server.offline.shards import Chunk
from server.offline.slices import Slice
from server.offline.sources import ChangedError

logger = logging.getLogger("nv_embed.encode")

_PR_SET_PDEATHSIG = 1
_AHEAD = 2
"""Shards that a process has been given: one that it writes, one that waits."""
_STOP_S = 20.0
"""How long a process may take to keep what it has when it is stopped."""


class Task(NamedTuple, Generic[Row]):
    """A shard that is to be written, and the index of its first row in the output."""

    chunk: Chunk[Row]
    first_index: int


class Crew(Protocol[Row]):
    """rows_kept: of shards that were not finished, on disk."""

    @property
    def rows_kept(self) -> int: ...

    def write(self, tasks: Iterable[Task[Row]], advance: Advance) -> Iterator[Written]:
        """Each shard, when it is on disk, in any order."""
        ...


class SliceCrew(Protocol):
    """Those that read what they write, on other machines perhaps. info: how the model runs there.
    A context manager."""

    info: RunnerInfo

    def __enter__(self) -> SliceCrew: ...

    def __exit__(self, *exception: object) -> None: ...

    def write(
        self, slices: Sequence[Slice], inputs: Sequence[Input], ledger: Ledger
    ) -> Iterator[Written | SliceEnd]:
        """Of each slice of these inputs, in any order, the shards that the ledger has not, then its
        end. Raises ChangedError for an input that is another by now."""
        ...


class Alone(Generic[Row]):
    """This process."""

    def __init__(self, writer: ShardWriter[Row]) -> None:
        self._writer = writer

    @property
    def rows_kept(self) -> int:
        return self._writer.rows_kept

    def write(self, tasks: Iterable[Task[Row]], advance: Advance) -> Iterator[Written]:
        for task in tasks:
            yield self._writer.write(task.chunk, task.first_index, advance)


class Team:
    """A process for each device. A context manager: on its way out it stops them."""

    rows_kept = 0  # nobody tells

    def __init__(self, recipe: Recipe, devices: Sequence[str]) -> None:
        """Starts them; what the first settles by timing the others take.

        Raises UnsupportedError where they would not make the same vectors.
        """
        self._members: list[_Member] = []
        cpus = sum(device == "cpu" for device in devices)
        threads = max(1, usable_cores() // cpus) if cpus else None
        try:
            for device in devices:
                share = recipe.arguments.threads or (threads if device == "cpu" else None)
                self._members.append(_Member(recipe, device, share))
            self._members[0].send(recipe.settled)
            self.info = self._members[0].ready()
            for member in self._members[1:]:
                member.send(Settled(self.info.dtype, dict(self.info.products)))
            for member in self._members[1:]:
                refuse_another(self.info, member.ready(), member.device)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def begin(self, run: str) -> None:
        """run: names what the vectors depend on."""
        for member in self._members:
            member.send(run)

    def write(self, tasks: Iterable[Task[Any]], advance: Advance) -> Iterator[Written]:
        todo = iter(tasks)
        at_work = {member.connection: 0 for member in self._members}
        is_more = True
        while is_more or any(at_work.values()):
            # The least busy first: one after the other, until each has one that waits.
            while is_more and (freest := min(at_work, key=at_work.__getitem__)) is not None:
                if at_work[freest] >= _AHEAD:
                    break
                task = next(todo, None)
                is_more = task is not None
                if task is not None:
                    self._member(freest).send(task)
                    at_work[freest] += 1
            for connection in wait([one for one, count in at_work.items() if count]):
                assert isinstance(connection, Connection)
                said = self._member(connection).receive()
                if isinstance(said, int):
                    advance(said)
                else:
                    at_work[connection] -= 1
                    yield said

    def _member(self, connection: Connection) -> _Member:
        return next(one for one in self._members if one.connection is connection)

    def close(self) -> None:
        for member in self._members:
            member.stop()
        for member in self._members:
            member.process.join(_STOP_S)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.connection.close()


class _Member:
    """A process with one device."""

    def __init__(self, recipe: Recipe, device: str, threads: int | None) -> None:
        self.device = device
        self.connection, theirs = multiprocessing.Pipe()
        name, environment = in_child(device, os.environ)
        changed = {key: v for key, v in environment.items() if os.environ.get(key) != v}
        self.process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(theirs, recipe, name, threads, changed), daemon=True
        )
        self.process.start()
        theirs.close()

    def ready(self) -> RunnerInfo:
        info = self.receive()
        assert isinstance(info, RunnerInfo), info
        return info

    def send(self, what: object) -> None:
        """Raises what the process failed with, if it has ended."""
        try:
            self.connection.send(what)
        except OSError:
            while True:  # its last words are still to be read
                self.receive()

    def receive(self) -> Any:
        """What it says next; what it fails with is raised here."""
        try:
            said = self.connection.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        if isinstance(said, Failure):
            raise said.error()
        return said

    def stop(self) -> None:
        with suppress(OSError):
            self.process.terminate()

    def _gone(self) -> OutputError:
        self.process.join(1)
        return OutputError(
            f"the process on {self.device} ended (exit code {self.process.exitcode}): the same "
            "command with --resume goes on"
        )


_KNOWN = (
    *(InputFileError, OutputError, ChangedError),
    *(SettingsError, CheckpointError, FileError, UnsupportedError),
    *(OSError, MemoryError),
)


class Failure(NamedTuple):
    """An error that a process ended with: its kind, and what it was made with."""

    kind: str
    arguments: tuple[Any, ...]

    def error(self) -> BaseException:
        known: Mapping[str, Callable[..., BaseException]] = {one.__name__: one for one in _KNOWN}
        return known.get(self.kind, RuntimeError)(*self.arguments)

    @classmethod
    def of(cls, error: Exception) -> Failure:
        if isinstance(error, OSError):
            return cls("OSError", (error.errno, error.strerror, error.filename))
        return cls(type(error).__name__, (f"{error}",))


class _StopError(BaseException):
    """SIGTERM: what is done is kept on the way out."""


def _work(
    connection: Connection,
    recipe: Recipe,
    device: str,
    threads: int | None,
    environment: Mapping[str, str],
) -> None:
    """The life of a process: it says what it is, then writes what it is given."""

    stopped = False

    def stop(signum: int, frame: object) -> None:
        nonlocal stopped
        if not stopped:  # once: what is kept on the way out is not interrupted
            stopped = True
            raise _StopError

    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process says when to stop
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with suppress(_StopError):
        try:
            _live(connection, recipe, device, threads)
        except (EOFError, BrokenPipeError):
            pass  # the first process has gone
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _live(connection: Connection, recipe: Recipe, device: str, threads: int | None) -> None:
    try:
        with resources.for_good():
            import model.encoder  # noqa: F401  (while the first one settles what all take)
        encoder = replace(recipe, settled=connection.recv()).encoder(device, threads)
        connection.send(encoder.runner.info)
        writer = recipe.writer(encoder, connection.recv())
        for task in _received(connection):
            connection.send(writer.write(task.chunk, task.first_index, connection.send))
    except (EOFError, BrokenPipeError):
        raise
    except Exception as error:
        connection.send(Failure.of(error))


def _received(connection: Connection) -> Iterator[Task[Any]]:
    """Tasks as they come; taken off by a thread, so that whoever deals them never waits."""
    tasks: SimpleQueue[Task[Any] | None] = SimpleQueue()

    def receive() -> None:
        try:
            while True:
                tasks.put(connection.recv())
        except (EOFError, OSError):
            tasks.put(None)

    Thread(target=receive, daemon=True).start()
    while (task := tasks.get()) is not None:
        yield task


def refuse_another(first: RunnerInfo, other: RunnerInfo, device: str) -> None:
    """Raises UnsupportedError where another writer would make other vectors."""
    for name in ("dtype", "quantization", "attention", "fused_kernels", "products", "width"):
        mine, theirs = getattr(first, name), getattr(other, name)
        if mine != theirs:
            raise UnsupportedError(
                f"--devices {device} would make other vectors: {name} is {theirs} there and {mine} "
                f"on {first.device}; set it, or use devices of one kind"
            )
    if first.device.partition(":")[0] != other.device.partition(":")[0]:
        raise UnsupportedError(
            f"--devices {device} would make other vectors than {first.device}: use devices of one "
            "kind"
        )
