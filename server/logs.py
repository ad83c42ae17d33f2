"""Log lines on stderr, as text or JSON. Knows no request; never sees input text or keys.

Whoever logs never waits for whoever reads: a thread writes, and what it cannot keep up with is
dropped, counted and said.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extra = "".join(f" {name}={value}" for name, value in _extra(record).items())
        line = f"{_timestamp(record.created)} {record.levelname:<7} {record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def details(named: dict[str, Any]) -> dict[str, Any]:
    """`extra` of a call of a logger: what its line says besides, by name. One attribute of the
    record, so that no line is searched for others."""
    return {"details": named}


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return getattr(record, "details", {})


def _timestamp(seconds: float) -> str:
    return f"{_whole_second(int(seconds))}.{int(seconds % 1 * 1000):03}Z"


@functools.lru_cache(maxsize=1)
def _whole_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class Outlet(logging.Handler):
    """Writes to a file descriptor, in a thread.

    Not a stream: the thread would hold the stream's lock while nobody reads, and the interpreter
    waits for that lock when it ends.
    """

    MOST_LINES = 8192
    """That wait; a server that is asked 4,000 times a second makes as many in two seconds."""
    GATHER_S = 0.02
    """After which lines are written together: to wake the thread for each would take longer than
    the line. Warnings wake it at once."""
    FLUSH_S = 1.0

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._lines: collections.deque[str] = collections.deque()
        self._dropped = 0
        self._gate = threading.Lock()  # not the handler's own, which whoever flushes may hold
        self._wake, self._hurry, self._idle = (threading.Event() for _ in range(3))
        self._idle.set()
        self._thread = threading.Thread(target=self._work, name="log", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: then whoever logs writes
            self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        with self._gate:
            if len(self._lines) < self.MOST_LINES:
                self._lines.append(line)
            else:
                self._dropped += 1
            self._idle.clear()
        if self._thread.ident is None:
            self._write_all()
            return
        if record.levelno >= logging.WARNING:
            self._hurry.set()
        if not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Wait until all is written; not for long, for perhaps nobody reads."""
        self._hurry.set()
        self._wake.set()
        self._idle.wait(self.FLUSH_S)

    def _work(self) -> None:
        while True:
            self._wake.wait()
            self._hurry.wait(self.GATHER_S)
            self._wake.clear()
            self._hurry.clear()
            self._write_all()

    def _write_all(self) -> None:
        while lines := self._take():
            lost = sum(chunk.count(b"\n") for chunk in _chunks(lines) if not self._write(chunk))
            with self._gate:
                self._dropped += lost
                dropped = self._dropped
            if dropped and self._write(self.format(_about_dropped(dropped)).encode() + b"\n"):
                with self._gate:
                    self._dropped -= dropped

    def _take(self) -> list[str]:
        with self._gate:
            lines = list(self._lines)
            self._lines.clear()
            if not lines:
                self._idle.set()
        return lines

    def _write(self, data: bytes) -> bool:
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # who started us shares it with us, and does not like to wait
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # nobody reads any more, or the disk is full
                return False
        return True


def _chunks(lines: list[str]) -> Iterator[bytes]:
    """Whole lines, together no longer than what a pipe takes in one piece: the workers write to
    the same one."""
    chunk = b""
    for line in lines:
        data = line.encode(errors="backslashreplace") + b"\n"
        if chunk and len(chunk) + len(data) > select.PIPE_BUF:
            yield chunk
            chunk = b""
        chunk += data
    yield chunk


def _about_dropped(count: int) -> logging.LogRecord:
    what = f"{count} log lines were dropped: they were not read in time"
    values = {"name": "nv_embed", "levelno": logging.WARNING, "levelname": "WARNING", "msg": what}
    return logging.makeLogRecord(values)


def configure(log_format: str, level: str) -> None:
    """Send all loggers to stderr; libraries only from warning on."""
    logging.basicConfig(handlers=[_to_stderr(log_format)], level=logging.WARNING, force=True)
    logging.getLogger("nv_embed").setLevel(level.upper())
    logging.captureWarnings(True)
    # Looked up for each record otherwise, and shown in no line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # nor who called: documented under that name
    if sys.version_info >= (3, 12):
        logging.logAsyncioTasks = False


def configure_own(log_format: str, level: str) -> None:
    """Send our own loggers to stderr, in a process whose others belong to somebody else."""
    logger = logging.getLogger("nv_embed")
    logger.handlers = [_to_stderr(log_format)]
    logger.setLevel(level.upper())
    logger.propagate = False


def _to_stderr(log_format: str) -> Outlet:
    handler = Outlet(2)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    return handler
