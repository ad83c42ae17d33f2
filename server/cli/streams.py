"""The three standard streams of a process that was started with some of them closed."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Give each of stdin, stdout and stderr that is closed /dev/null. Otherwise the next files that
    are opened take their places, and whoever prints writes into them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    # Python has made none for those that were closed.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
