"""How many files this process may open, and how many connections fit into them."""

from __future__ import annotations

import contextlib
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
