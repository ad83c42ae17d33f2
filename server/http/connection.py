"""HTTP/1.1 with limits: the bytes of one connection, and how long each of its states may last.

Around uvicorn's request cycle, which speaks ASGI. Uvicorn's own protocol limits no headers, waits
for ever, parses what is pipelined without a bound, and lets httptools take an offer to upgrade for
the end of HTTP. Here a connection is in one state, serves one request at a time, and while no
request runs exactly one timer is armed:

                first byte       blank line         last byte           answer's end
    ┌──▶ IDLE ────────────▶ HEAD ──────────▶ BODY ───────────▶ ANSWER ───────────────┐
    │                                         │ last byte, answered before            │
    └─────────────────────────────────────────┴───────────────────────────────────────┘
       any of them ── refused, or answered for the last time ──▶ LINGER ──▶ CLOSING ──▶ GONE

    state     time limit                                              when it has passed
    IDLE      keep_alive_timeout; before the first: header_timeout    close
    HEAD      header_timeout                                          408
    BODY      body_timeout, whether it is answered already or not     408, if it is not
    ANSWER    none: it is the server's turn
    LINGER    linger_timeout                                          close
    CLOSING   write_timeout, for what was written to be taken         reset

A client that does not read has write_timeout instead, in the first four: then a reset. No byte but
those that change the state touches a timer.

The parser is shown one request at a time, up to its last byte: what comes behind is held as it is
until the request is answered, and much of it stops the reading. So nothing is parsed ahead, no
answer overtakes another, and what is kept is a read or two at most. Refusals are in the one
envelope: too many or too large headers 431, slow senders 408, what is no request 400, connections
beyond the cap 503.

Knows nothing of routes. Whoever works on a request can ask whether its client has gone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, NoReturn

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.request_context import disconnect_extension
from server.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    ServerError,
    UnavailableError,
)
from server.http.request_head import problem_of, refusal

_LINGERING = 128
"""So many connections beyond the cap may linger; more are closed as soon as they are answered."""
_PIECE = 4 * 1024
"""Bytes that the parser is shown at once where it is not known how long the request is."""
_PIECES = 16
"""Pieces in one turn of the event loop: a body may come in chunks, or pieces, of a few bytes."""
_YOUNGEST = 0.75
"""Part of max_connection_age after which a connection may count as old."""
_ages = random.Random()  # noqa: S311  (no secrets)
_BLANK_LINE = b"\r\n\r\n"
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


@dataclass(frozen=True, slots=True)
class ProtocolLimits:
    """Bytes, counts and seconds that one connection may take."""

    header_timeout: float
    body_timeout: float
    write_timeout: float
    max_connections: int
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_connection_age: float | None = None
    """Then the next answer is the last: a client or a proxy that keeps its connections would never
    find a server that was added later."""
    keep_alive_timeout: float = 75.0
    """Longer than clients keep idle connections (httpx: 5 s), so that they close first: one that
    the server closes while a request is on its way is an error to the client."""
    linger_timeout: float = 1.0
    """After a refusal the rest of the request is read and dropped for so long: closing at once
    would reset the connection, and the client might never see the answer."""


class _State(Enum):
    """See the drawing above."""

    IDLE = "between requests"
    HEAD = "a part of a head has come"
    BODY = "the head is complete, the body is not"
    ANSWER = "the request is complete, its answer is not"
    LINGER = "whatever comes is dropped"
    CLOSING = "what was written is on its way, then the end"
    GONE = "nothing is left of it"


_IDLE, _HEAD, _BODY, _ANSWER, _LINGER, _CLOSING, _GONE = _State
_READING = (_IDLE, _HEAD, _BODY)
_ENDING = (_LINGER, _CLOSING, _GONE)


class _Flow(FlowControl):
    """Reading rests while much is held, whoever asks for more."""

    resting = False

    def resume_reading(self) -> None:
        if not self.resting:
            super().resume_reading()


class _Door:
    """The transport as a request cycle sees it: how the connection ends is not for it to say, and
    the head of an answer waits for its body, for each write is a call of the system."""

    __slots__ = ("_close", "_head", "_is_new", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self._close, self.is_closing = transport, close, transport.is_closing
        self._head, self._is_new = b"", True

    def write(self, data: bytes) -> None:
        if self._head:
            self._transport.writelines([self._head, data])
            self._head = b""
        elif self._is_new and not data.startswith(b"HTTP/1.1 100"):
            self._head, self._is_new = data, False
        else:
            self._transport.write(data)

    def answered(self) -> None:
        """What is written now belongs to another answer."""
        self._let_out()
        self._is_new = True

    def close(self) -> None:
        self._let_out()
        self._close()

    def _let_out(self) -> None:
        """A head without a body: the answer to HEAD, or of an app that has failed amid it."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `limits` and `on_refusal` are set by `limited`."""

    limits: ProtocolLimits
    on_refusal: Callable[[int], None]
    flow: _Flow
    handshake: object = None  # counted as a connection until now

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = _IDLE
        self._timer: asyncio.TimerHandle | None = None
        self._stale = True  # the timer is that of an earlier state
        self._held = bytearray()  # received, and not yet shown to the parser
        self._later = False  # the rest of it has to wait for its turn
        self._fruitless = 0  # bytes shown since the head began, or since the body's last data
        self._body_left = 0  # of a body of known length
        self._offer = False  # this request offers another protocol
        age = self.limits.max_connection_age
        # Not all of a crowd at once: those that came together would go together.
        self._old_at = self.loop.time() + age * _ages.uniform(_YOUNGEST, 1) if age else None
        self._fault: ServerError | None = None  # why a callback ended the parser's run

    # What happens to a connection; each ends in `_settle`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.connections.discard(self.handshake)
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._door = _Door(transport, self._end)
        excess = len(self.connections) - self.limits.max_connections
        if excess > 0:
            self._refuse(UnavailableError("too many connections", retry_after=1))
        if excess > _LINGERING:
            self._close()
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tell_gone()
        super().connection_lost(exc)
        self._enter(_GONE)
        self._settle()
        # So that the garbage collector need not look for it.
        self.cycle = self.scope = self.headers = self._door = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._state not in _ENDING:
            self._held += data
            self._parse()
            self._settle()

    def eof_received(self) -> None:
        """The transport closes itself now: half a connection is taken for none."""
        self._tell_gone()
        self._enter(_CLOSING)
        self._settle()

    def on_response_complete(self) -> None:
        """The cycle has written the last byte of its answer."""
        self._door.answered()
        self.server_state.total_requests += 1
        if self._state is _ANSWER:
            self._enter(_IDLE)
            if self._held:
                self._parse()
        self._settle()

    def _end(self) -> None:
        """The cycle closes: this was the last answer, or the app has failed amid it."""
        if self._state is _ANSWER and not self._held:
            self._close()
        elif self._state not in _ENDING:
            self._enter(_LINGER)
        self._settle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stale = True
        self._settle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stale = True
        self._settle()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing() and self._state is not _GONE:
            self._enter(_CLOSING)
        self._settle()

    def _too_late(self) -> None:
        if self._state in (_HEAD, _BODY) and not self.flow.write_paused:
            self._refuse(RequestTimeoutError("The request did not arrive in time"))
        elif self._state is _LINGER or (self._state is _IDLE and not self.flow.write_paused):
            self._close()
        else:
            self.transport.abort()
        self._settle()

    def _next_turn(self) -> None:
        self._later = False
        self._parse()
        self._settle()

    # The state

    def _enter(self, state: _State) -> None:
        self._state, self._stale = state, True
        if state in _ENDING:
            self._held.clear()

    def _close(self) -> None:
        self._enter(_CLOSING)
        self.transport.close()

    def _settle(self) -> None:
        """Arm the timer of the state, and read on or not."""
        if self._stale:
            self._stale = False
            if self._timer is not None:
                self._timer.cancel()
            seconds = self._patience()
            self._timer = self.loop.call_later(seconds, self._too_late) if seconds else None
        if self._state in (_CLOSING, _GONE):
            return
        self.flow.resting = self._later or len(self._held) > HIGH_WATER_LIMIT
        if self.flow.resting:
            self.flow.pause_reading()
        elif self.flow.read_paused and (self._state is not _BODY or self._takes_body()):
            # A large last piece has stopped the reading, and whoever has the whole body asks for no
            # more: read on, or nobody sees the client go.
            self.flow.resume_reading()

    def _patience(self) -> float | None:
        """Seconds that the client has; the table above."""
        state, limits = self._state, self.limits
        if state is _GONE:
            return None
        if state is _LINGER:
            return limits.linger_timeout
        if state is _CLOSING or self.flow.write_paused:
            return limits.write_timeout
        if state is _ANSWER:
            return None
        if state is _BODY:
            return limits.body_timeout
        if state is _HEAD or self.cycle is None:
            return limits.header_timeout
        return limits.keep_alive_timeout

    def _takes_body(self) -> bool:
        return self.cycle.response_complete or len(self.cycle.body) <= HIGH_WATER_LIMIT

    # Reading

    def _parse(self) -> None:
        """Show the parser what is held, up to the end of one request."""
        held = self._held
        for _ in range(_PIECES):
            if self._state in (_IDLE, _ANSWER) and held and held[0] in _BLANK_LINE:
                del held[: len(held) - len(held.lstrip(_BLANK_LINE))]
            if not held or self._state not in _READING:
                return
            if self._state is _IDLE:
                self._fruitless = 0
            size = min(self._body_left, len(held)) or self._size_of_piece()
            if not size:
                return
            if not self._body_left:
                self._fruitless += size
                if self._fruitless > self.limits.max_header_bytes:
                    self._refuse(self._headers_too_large())
                    return
            self._body_left -= min(size, self._body_left)
            piece = held[:size]
            del held[:size]
            self._show(piece)
        if not self._later:
            self._later = True
            self.loop.call_soon(self._next_turn)

    def _size_of_piece(self) -> int:
        """Where the parser has to stop for now: each head and each chunked body ends in a blank
        line, so no piece reaches beyond one, and a part of one at the end waits for the rest."""
        end = self._held.find(_BLANK_LINE, 0, _PIECE)
        if end >= 0:
            return end + len(_BLANK_LINE)
        size = min(len(self._held), _PIECE)
        last = self._held[max(size - 3, 0) : size]
        return size - len(last) + len(last.rstrip(_BLANK_LINE))

    def _show(self, piece: bytearray) -> None:
        try:
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade:
                self._ignore_offer()
        except httptools.HttpParserError:
            self._refuse(
                self._fault or InvalidRequestError("These bytes are not an HTTP/1.1 request")
            )

    def _ignore_offer(self) -> None:
        """Nobody has to change the protocol (RFC 9110, 7.8), but the parser takes what follows the
        head for another one. So another parser is told how long the body is, and reads that."""
        self._offer = False
        lines = (b"%s: %s\r\n" % header for header in self.headers if header[0] in _FRAMING)
        target = SimpleNamespace(on_body=self.on_body, on_message_complete=self._offer_is_over)
        self.parser = httptools.HttpRequestParser(target)
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(lines))

    def _offer_is_over(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.on_message_complete()

    def on_message_begin(self) -> None:
        assert self._state is _IDLE, self._state  # a piece held more than one request
        super().on_message_begin()
        # Whoever works on the request and does not read need not have a task that only listens.
        self._gone = self.loop.create_future()
        self.scope["extensions"] = disconnect_extension(self._gone)
        self._enter(_HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._state is not _HEAD:
            return  # a trailer says nothing that the head did not
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        if len(self.headers) > self.limits.max_headers:
            self._stop(self._headers_too_large())

    def on_headers_complete(self) -> None:
        header = dict(self.headers)
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if problem := problem_of(version, method, self.headers, header):
            self._stop(InvalidRequestError(problem))
        super().on_headers_complete()
        self.cycle.transport = self._door  # type: ignore[assignment]
        if self._old_at is not None and self.loop.time() > self._old_at:
            self.cycle.keep_alive = False  # and its answer says so
        self._body_left, self._fruitless = int(header.get(b"content-length", 0)), 0
        self._offer = self.parser.should_upgrade()
        self._enter(_BODY)

    def on_body(self, body: bytes) -> None:
        self._fruitless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offer:
            return  # the parser's view: behind the head another protocol begins
        self.cycle.more_body = False
        self.cycle.message_event.set()
        self._enter(_IDLE if self.cycle.response_complete else _ANSWER)

    # Refusals

    def _stop(self, error: ServerError) -> NoReturn:
        """End the parser's run from within a callback."""
        self._fault = error
        raise ValueError(error.message)

    def _headers_too_large(self) -> HeadersTooLargeError:
        limits = self.limits
        return HeadersTooLargeError(
            f"The headers are beyond {limits.max_header_bytes} bytes or {limits.max_headers} lines"
        )

    def _refuse(self, error: ServerError) -> None:
        """The end, with an answer to what is being read unless one has begun."""
        started = self.cycle is not None and self.cycle.response_started
        if self._state in (_IDLE, _HEAD) or (self._state is _BODY and not started):
            self.transport.write(refusal(error))
            type(self).on_refusal(error.status)
        if self._state not in (_IDLE, _HEAD):
            self._tell_gone()  # or somebody waits for the rest
        self._enter(_LINGER)

    def _tell_gone(self) -> None:
        """Whoever works on the request learns that nobody waits for its answer."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if not self._gone.done():
                self._gone.set_result(None)


def limited(limits: ProtocolLimits, on_refusal: Callable[[int], None]) -> type[LimitedProtocol]:
    """The protocol class of one server; `on_refusal` gets the status of each refusal."""
    attributes = {"limits": limits, "on_refusal": staticmethod(on_refusal)}
    return type("Protocol", (LimitedProtocol,), attributes)
