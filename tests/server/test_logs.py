"""The log: nobody who writes it ever waits for whoever reads it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.logs import Outlet
from tests.server.processes import ROOT


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end) of a pipe; a test may close either."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


def log(outlet: Outlet, count: int, level: int = logging.INFO) -> float:
    """Log numbered lines; returns how long that took."""
    started = time.monotonic()
    for number in range(count):
        outlet.handle(logging.makeLogRecord({"msg": f"line {number} {'x' * 80}", "levelno": level}))
    return time.monotonic() - started


def read_all(fd: int, until: str) -> list[str]:
    """Lines that come up to and with the one that holds `until`."""
    data = b""
    while until.encode() not in data or not data.endswith(b"\n"):
        data += os.read(fd, 1 << 16)
    return data.decode().splitlines()


def test_lines_come_whole_and_in_order(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    log(outlet, 300)
    lines = read_all(pipe[0], "line 299")
    assert [int(line.split()[1]) for line in lines] == list(range(300))


def test_what_a_stopped_reader_misses_is_dropped_counted_and_said(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    outlet.FLUSH_S = 0.1
    total = 3 * Outlet.MOST_LINES
    log(outlet, total)  # ends, though nobody reads
    outlet.flush()  # does not wait for ever
    log(outlet, 1)
    came = dropped = 0
    while came + dropped < total + 1:
        for line in read_all(pipe[0], "\n"):
            is_said = "were dropped" in line
            dropped += int(line.split()[0]) if is_said else 0
            came += not is_said
    assert came + dropped == total + 1
    assert dropped > Outlet.MOST_LINES // 2
    outlet.flush()
    log(outlet, 1, logging.WARNING)
    assert len(read_all(pipe[0], "line 0")) == 1, "said once"


def test_a_reader_that_has_gone_is_no_error(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    os.close(pipe[0])
    log(outlet, 100, logging.ERROR)
    outlet.flush()
    assert outlet._thread.is_alive()


def test_lines_that_a_full_disk_took_are_counted(pipe: tuple[int, int]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    outlet = Outlet(full)
    log(outlet, 7)
    outlet.flush()
    os.dup2(pipe[1], full)  # room again
    log(outlet, 1)
    assert read_all(pipe[0], "dropped")[-1].startswith("7 log lines were dropped")
    os.close(full)


def test_a_pipe_that_does_not_wait_loses_no_line(pipe: tuple[int, int]) -> None:
    """Who started us may share its end with us, and have set it so."""
    os.set_blocking(pipe[1], False)
    outlet = Outlet(pipe[1])
    log(outlet, 3000)
    lines = read_all(pipe[0], "line 2999")
    assert [int(line.split()[1]) for line in lines] == list(range(3000))


def test_lines_of_two_processes_do_not_mix(pipe: tuple[int, int]) -> None:
    first, second = Outlet(pipe[1]), Outlet(pipe[1])
    for number in range(1000):
        for letter, outlet in (("a", first), ("b", second)):
            record = {"msg": f"{number} {letter * 100}", "levelno": logging.INFO}
            outlet.handle(logging.makeLogRecord(record))
    lines: list[str] = []
    while len(lines) < 2000:
        lines += read_all(pipe[0], "\n")
    for letter in "ab":
        mine = [line for line in lines if letter in line]
        assert mine == [f"{number} {letter * 100}" for number in range(1000)]


_ENDS = """
import logging, sys
from server import logs
logs.configure(sys.argv[1], "info")
for number in range(20_000):
    logging.getLogger("nv_embed").info("line %d", number)
"""


@pytest.mark.process
@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("reader", ["reads", "stopped", "gone"])
def test_a_process_ends_whoever_reads(reader: str, log_format: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _ENDS, log_format]
    with (tmp_path / "log").open("wb") as file:
        target = file if reader == "reads" else subprocess.PIPE
        process = subprocess.Popen(command, stderr=target, cwd=ROOT)
    if reader == "gone":
        assert process.stderr is not None
        process.stderr.close()
    assert process.wait(10) == 0
    if reader == "reads":
        lines = (tmp_path / "log").read_text().splitlines()
        assert len([line for line in lines if "line" in line]) > Outlet.MOST_LINES
    if process.stderr is not None:
        process.stderr.close()


def test_without_a_thread_whoever_logs_writes(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    outlet = Outlet(pipe[1])
    log(outlet, 2)
    assert len(os.read(pipe[0], 10_000).splitlines()) == 2
    outlet.flush()
