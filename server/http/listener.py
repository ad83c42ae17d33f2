"""Where a server listens: a port or a Unix socket, which it makes and removes."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from server.errors import SettingsError
from server.settings import Settings

BACKLOG = 2048


def listen(settings: Settings) -> tuple[socket.socket, str]:
    """A socket that listens, and how to reach it. Raises SettingsError when it cannot."""
    if settings.uds:
        listener = socket.socket(socket.AF_UNIX)
        address = f"unix:{settings.uds}"
        target: str | tuple[str, int] = settings.uds
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        target = (settings.host, settings.port)
    try:
        if settings.uds and not _is_served(settings.uds):
            unlink_socket(settings.uds)
        listener.bind(target)
        listener.listen(BACKLOG)  # now, for the log is about to say so
    except OSError as error:
        listener.close()
        where, option = f"{settings.host}:{settings.port}", "--host or --port"
        if settings.uds:
            where, option = settings.uds, "--uds"
        why = error.strerror or error  # too long a path has no number, so no strerror
        if settings.uds and error.errno == errno.EADDRINUSE and not _is_socket(settings.uds):
            why = "there is something else that is no socket"
        raise SettingsError(f"cannot listen on {where}: {why} ({option})") from None
    if not settings.uds:
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.tls_certificate else "http"
        address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    return listener, address


def _is_served(path: str) -> bool:
    """Whether somebody listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def unlink_socket(path: str) -> None:
    """Remove the socket file that an earlier server left; never another kind of file."""
    with contextlib.suppress(FileNotFoundError):
        if _is_socket(path):
            os.unlink(path)


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.stat(path).st_mode)
