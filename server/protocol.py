"""HTTP/1.1 with limits: uvicorn's httptools protocol limits no headers and waits for ever.

Too many or too large headers get a 431, slow senders a 408, unparsable bytes a 400, connections
beyond the cap a 503, all in the one envelope; a client that does not read is cut off. Knows
nothing of routes. `scope["disconnected"]` is a future that is done when the client has gone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerError,
    UnavailableError,
)

_LINGER_S = 1.0
"""After a refusal the rest of the request is read and dropped for so long: closing at once would
reset the connection, and the client might never see the answer."""


@dataclass(frozen=True, slots=True)
class ProtocolLimits:
    """Bytes, counts and seconds that one connection may take."""

    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    header_timeout: float = 10.0
    body_timeout: float = 120.0
    write_timeout: float = 60.0
    max_connections: int = 4096


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `limits` and `on_refusal` are set by `limited`."""

    limits = ProtocolLimits()
    on_refusal: Callable[[int], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # that came of a head that is not complete
        self._line_bytes = 0  # in the header lines of the request that is being read
        self._in_head = True
        self._excess = False
        self._refused = False
        self._running: RequestResponseCycle | None = None
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(UnavailableError("too many connections", retry_after=1))
        else:
            self._time_reading(self.limits.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._read_timer)
        self._stop(self._write_timer)
        # uvicorn tells the newest request; with pipelining, that is not the one that runs.
        for cycle in (self._running, self.cycle):
            self._tell(cycle)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        # The parser does not report a header that never ends, so an incomplete head is counted
        # here, and the lines of one that comes in a piece are counted in `on_header`.
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_header_bytes:
                self._refuse_headers()

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # Whoever works on the request and does not read need not have a task that only listens.
        self.scope["disconnected"] = self.loop.create_future()  # type: ignore[typeddict-unknown-key]
        self._in_head, self._head_bytes, self._line_bytes, self._excess = True, 0, 0, False
        self._time_reading(self.limits.header_timeout)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._line_bytes += len(name) + len(value)
        limits = self.limits
        if len(self.headers) > limits.max_headers or self._line_bytes > limits.max_header_bytes:
            self._excess = True
            raise ValueError("headers beyond the limit")  # ends the parser's run

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._time_reading(self.limits.body_timeout)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop(self._read_timer)
        super().on_message_complete()
        # A large last piece has stopped the reading, and whoever has the whole body asks for no
        # more: read on, or nobody sees the client go. Behind a request that waits, uvicorn stops.
        if not self.pipeline:
            self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's way to answer what its parser refuses."""
        if self._excess:
            self._refuse_headers()
        else:
            self._refuse(InvalidRequestError("These bytes are not an HTTP/1.1 request"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    # Writing

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(self._write_timer)
        super().resume_writing()

    # Refusals

    def _time_reading(self, seconds: float) -> None:
        self._stop(self._read_timer)
        self._read_timer = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        answering = self.cycle is not None and self.cycle.response_started
        if self.transport.is_closing() or answering:
            return  # whoever answers before all was read has ended the matter
        if self._in_head and not self._head_bytes:
            self.transport.close()  # nothing was asked
        else:
            self._refuse(RequestTimeoutError("The request did not arrive in time"))

    def _refuse_headers(self) -> None:
        limits = self.limits
        self._refuse(
            HeadersTooLargeError(
                f"The headers are beyond {limits.max_header_bytes} bytes or {limits.max_headers} "
                "lines"
            )
        )

    def _refuse(self, error: ServerError) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._stop(self._read_timer)
        body = orjson.dumps(error.body())
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": uuid.uuid4().hex,
            **error.headers(),
            "connection": "close",
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
        self.transport.write(f"{status}{head}\r\n".encode() + body)
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever waits for the rest of this request is told that its client has gone.
            self._tell(self.cycle)
        self.loop.call_later(_LINGER_S, self.transport.close)
        type(self).on_refusal(error.status)

    @staticmethod
    def _tell(cycle: RequestResponseCycle | None) -> None:
        """The client of this request has gone."""
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
            disconnected = cycle.scope["disconnected"]  # type: ignore[typeddict-item]
            if not disconnected.done():
                disconnected.set_result(None)

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def limited(limits: ProtocolLimits, on_refusal: Callable[[int], None]) -> type[LimitedProtocol]:
    """The protocol class of one server; `on_refusal` gets the status of each refusal."""
    attributes = {"limits": limits, "on_refusal": staticmethod(on_refusal)}
    return type("Protocol", (LimitedProtocol,), attributes)
