"""The process of a worker: started with one end of a socket, awaited, and killed if it must be.

Knows nothing of what is said over the socket (server/engine/worker_link.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

STOP_S = 1.0
"""How long a worker may take to end after its socket has closed; nobody awaits it any more."""
KILLED_S = 10.0
"""How long it may take after it was killed: the kernel frees its memory first. Its successor would
find its device full."""
TEMPORARY = frozenset((errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE))
"""Errors for want of what others have for the moment."""
_DEADLY_BY_ITSELF = frozenset(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
)
"""Signals that a process earns by its own doing; others send it the rest."""


_MOMENT_S = 0.2
"""In which a killed process ends, but for one whose device holds it."""


async def start(
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
        await reap(process, 0.0, STOP_S)
        raise


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


async def reap(process: subprocess.Popen[bytes], patience: float, killed: float) -> int | None:
    """Wait for the process, whose socket is closed; kill it when it takes too long. None when even
    that does not end it in time, which the kernel does when a device no longer answers."""
    try:
        await _exit_status(process, patience)
    except asyncio.CancelledError:  # nobody wants to wait any more, and yet it must not be left
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_MOMENT_S)
        raise
    if process.returncode is None:
        process.kill()
    return await _exit_status(process, killed)


async def _exit_status(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Its exit status, if it ends in time. Takes neither a thread nor a file: both may be out."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return process.returncode


def describe(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "killed, and it does not end"
    return f"signal {-status}" if status < 0 else f"status {status}"


def is_its_own_doing(status: int | None) -> bool:
    """Whether nobody else ended it."""
    return status is not None and (status >= 0 or -status in _DEADLY_BY_ITSELF)
