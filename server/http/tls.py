"""TLS before HTTP: a connection counts from its accept, and its handshake has a time limit.

Asyncio tells a protocol of a TLS connection when the handshake is over, so a client that says
nothing would cost a file and be counted nowhere. Beyond the cap a connection is cut off, for an
answer would need the handshake first. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from typing import cast

from server.http.connection import LimitedProtocol


class Handshake(asyncio.Protocol):
    """Stands for a connection until TLS is spoken and `http` has it."""

    def __init__(self, http: LimitedProtocol, tls: ssl.SSLContext) -> None:
        self._http, self._tls = http, tls
        http.handshake = self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Only once it is accepted, so that it can be refused, is it made a connection with TLS."""
        connections = cast(set[object], self._http.connections)
        if len(connections) < self._http.limits.max_connections:
            with contextlib.suppress(OSError):  # no more files, or it has gone already
                fd = os.dup(transport.get_extra_info("socket").fileno())
                connections.add(self)
                accepted = socket.socket(fileno=fd)
                self._task = self._http.loop.create_task(self._shake_hands(accepted))
        cast(asyncio.Transport, transport).abort()

    async def _shake_hands(self, accepted: socket.socket) -> None:
        seconds = self._http.limits.header_timeout
        try:
            await self._http.loop.connect_accepted_socket(
                lambda: self._http,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=seconds,
                ssl_shutdown_timeout=seconds,
            )
        except (OSError, asyncio.CancelledError):
            accepted.close()  # not TLS, none that is accepted here, too slow, gone, or shut down
        finally:
            self._http.connections.discard(self)

    def shutdown(self) -> None:
        """Called by uvicorn, as on every connection."""
        self._task.cancel()


def with_tls(http: type[LimitedProtocol], tls: ssl.SSLContext) -> Callable[..., Handshake]:
    """To uvicorn the same as `http`: it makes the protocol of a connection that is accepted."""
    return lambda **arguments: Handshake(http(**arguments), tls)
