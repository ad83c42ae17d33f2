"""A program that holds a cluster of Ray, seen from outside, where Ray is not imported.

It reads a line of JSON for each thing that it shall do, and answers with one.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MARK = "RAY_TRIAL"
"""A variable that all of a cluster's processes inherit, by which they are found."""
PATIENCE_S = 120.0
LEFT_S = 20.0
STORE_BYTES = 100 * 2**20
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


class Program:
    """The other end. It is there when the program has said a first word."""

    def __init__(
        self,
        module: str,
        folder: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """folder: for all that Ray writes."""
        self.mark = f"{os.getpid()}-{folder.name}"
        self.log_file = folder / "log"
        self.environment = {**os.environ, **QUIET, MARK: self.mark, "HOME": str(folder)}
        self.environment |= environment or {}
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(folder), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
            )
        self.first = self._answer()

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")[-5000:]

    def processes(self, title: str = "") -> list[int]:
        """Ids of all its processes that run, or of those whose command begins so."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                said = (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_text()
                zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if f"{MARK}={self.mark}".encode() in said and command.startswith(title) and not zombie:
                found.append(int(folder.name))
        return sorted(found)

    def memory(self) -> int:
        """Bytes of all its processes; what several share is counted once."""
        total = 0
        for pid in self.processes():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        return total

    def stop(self) -> list[str]:
        """-> commands of the processes that are left, which are killed."""
        with suppress(AssertionError, OSError, subprocess.TimeoutExpired):
            if self._process.poll() is None:
                self.tell("stop")
            self._process.wait(PATIENCE_S)
        deadline = time.monotonic() + LEFT_S
        while (pids := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = []
        for pid in pids:
            with suppress(OSError):
                left.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:100])
                os.kill(pid, signal.SIGKILL)
        return left

    def tell(self, verb: str, what: Any = None) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, what]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the cluster's program has ended ({self._process.poll()}):\n{self.log}"
        return json.loads(line)


@contextmanager
def answering() -> Iterator[Callable[..., None]]:
    """Of the program: says something to the other end. Whatever else is printed goes to the log."""
    with os.fdopen(os.dup(1), "w") as file:
        os.dup2(2, 1)

        def answer(what: Any = None) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        yield answer


def in_own_network() -> bool:
    """Whether there is nothing but the loopback, which is raised, as `ip link set lo up` does."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        return False
    up, set_flags = 0x1 | 0x40, 0x8914
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh22x", b"lo", up))
    return True
