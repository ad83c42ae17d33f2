"""What this process has of its system: its three standard streams, how many files it may open, and
the environment that it hands on.

Sets the first two right at the start; knows nothing of what the files are for.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys

from server.errors import SettingsError

_OWN_FILES = 48
"""Beside connections: the listener, the loop, the log, libraries; about 20 at rest."""
_FILES_PER_WORKER = 8
"""A worker's socket, and what it takes to start its successor."""
_REFUSED_SHARE = 8
"""One part in so many of all files is left to connections that are being refused."""
_LEAST_CONNECTIONS = 8
_SECRETS = frozenset(
    ("NV_EMBED_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
)
"""Variables that no child has a use for: none asks for keys or downloads."""


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


def raise_file_limit() -> int:
    """Allow as many open files as may be; returns how many. The usual 1,024 are made for programs
    that wait with select(), which nothing here does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS refuses its own "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def most_connections(files: int, wanted: int, workers: int) -> int:
    """How many connections of the `wanted` fit into so many open files.

    Raises SettingsError when that is hardly any.
    """
    reserve = _OWN_FILES + _FILES_PER_WORKER * workers
    fit = min(wanted, files - files // _REFUSED_SHARE - reserve)
    if fit < min(wanted, _LEAST_CONNECTIONS):
        needed = (reserve + _LEAST_CONNECTIONS) * 2
        raise SettingsError(
            f"only {files} open files are allowed, too few to serve: raise the limit to {needed} "
            "or more (ulimit -n)"
        )
    return fit


def child_environment() -> dict[str, str]:
    """Our own without its secrets."""
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}
