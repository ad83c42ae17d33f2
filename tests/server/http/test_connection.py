"""The state machine of a connection, in this process: short time limits, an app that tells what it
was given, and a loop whose timers can be counted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import json
import re
import socket
import time
import tomllib
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import httptools
import pytest
import uvicorn
import uvloop
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.api.request_context import disconnect_of
from server.http.connection import LimitedProtocol, ProtocolLimits, _Door, limited
from tests.server.processes import ROOT

pytestmark = pytest.mark.process

PATIENT = ProtocolLimits(
    header_timeout=10.0, body_timeout=120.0, write_timeout=60.0, max_connections=4096
)
LIMITS = ProtocolLimits(
    header_timeout=0.7,
    body_timeout=0.7,
    write_timeout=0.7,
    max_connections=4096,
    keep_alive_timeout=0.7,
    linger_timeout=0.1,
    max_header_bytes=20_000,
)
LONGEST_S = 30.0
"""After which a time limit was forgotten, however busy the machine is."""


class Timers:
    """One connection's view of the loop, and the timers that it has armed there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._handles = loop, set[asyncio.TimerHandle]()
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, delay: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        def call() -> None:
            self._handles.discard(handle)
            callback()

        handle = self._loop.call_later(delay, call)
        self._handles.add(handle)
        self.most = max(self.most, self.armed)
        return handle

    @property
    def armed(self) -> int:
        return sum(not handle.cancelled() for handle in self._handles)


class Server:
    """Listens on 127.0.0.1. Answers with what came; how is said by the path: /early answers before
    the body is read, /large-N with N bytes, /wait when `released`, /fail fails amid its answer and
    /fail-early behind its head."""

    def __init__(self, limits: ProtocolLimits = LIMITS) -> None:
        loop = asyncio.get_running_loop()
        self.loop, self.state = loop, ServerState()
        self.refusals: list[int] = []
        self.released = asyncio.Event()
        self.connections: list[weakref.ref[LimitedProtocol]] = []
        self.timers: list[Timers] = []
        self.clients: list[Client] = []
        self.requests = 0
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, ws="none", interface="asgi3"
        )
        config.load()
        protocol = limited(limits, self.refusals.append)

        def make() -> LimitedProtocol:
            self.timers.append(Timers(loop))
            made = protocol(
                config=config, server_state=self.state, app_state={}, _loop=self.timers[-1]
            )
            self.connections.append(weakref.ref(made))
            return made

        self.make = make

    async def timers_of(self, client: Client) -> Timers:
        """Of the connection that is this client's, once it is accepted."""
        name = client.socket.getsockname()
        accepted: list[Timers] = []
        while not accepted:
            await asyncio.sleep(0.005)
            accepted = [one.loop for one in self.state.connections if one.client == name]
        return accepted[0]

    def has_lost(self, timers: Timers) -> bool:
        return all(one.loop is not timers for one in self.state.connections)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        path, body = scope["path"], b""
        if path.startswith("/wait"):
            gone = disconnect_of(scope)
            assert gone is not None
            await asyncio.wait(
                [gone, asyncio.ensure_future(self.released.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
        while not path.startswith("/early"):
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.disconnect" or not message["more_body"]:
                break
        names = [name.decode() for name, _ in scope["headers"]]
        values = [value.decode() for _, value in scope["headers"]]
        seen = {"path": path, "body": body.decode(), "headers": [*zip(names, values, strict=True)]}
        answer = json.dumps(seen).encode()
        if size := re.fullmatch(r"/large-(\d+)", path):
            answer = b"x" * int(size[1])
        headers = [(b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if path == "/fail-early":
            raise RuntimeError("the app has a bug")
        if path == "/fail":
            await send({"type": "http.response.body", "body": answer[:5], "more_body": True})
            raise RuntimeError("the app has a bug")
        await send({"type": "http.response.body", "body": answer})

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Server]:
        server = await self.loop.create_server(self.make, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
            async with asyncio.timeout(10):
                while self.state.connections:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            server.close()
            for client in self.clients:
                client.socket.close()
            for connection in self.state.connections:
                connection.transport.abort()
            await asyncio.sleep(0.01)
        assert all(timers.most == 1 for timers in self.timers)
        assert all(timers.armed == 0 for timers in self.timers), "one outlived its connection"


class Client:
    """Writes bytes, reads answers; a small receive buffer where it shall not read much."""

    @classmethod
    async def to(cls, server: Server, receive_buffer: int | None = None) -> Client:
        client, loop = cls(), asyncio.get_running_loop()
        client.socket = socket.socket()
        server.clients.append(client)
        if receive_buffer:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.socket.setblocking(False)
        await loop.sock_connect(client.socket, ("127.0.0.1", server.port))
        client.rest = b""
        return client

    socket: socket.socket
    rest: bytes
    head: bytes

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a segment of its own."""
        for index, piece in enumerate(pieces):
            if index:
                await asyncio.sleep(0.02)
            await asyncio.get_running_loop().sock_sendall(self.socket, piece)

    async def receive(self) -> bytes:
        try:
            return await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        except ConnectionError:
            return b""

    async def answer(self) -> tuple[int, bytes]:
        """The next one: its status and body. What comes behind is kept for the next call."""
        while b"\r\n\r\n" not in self.rest:
            more = await self.receive()
            assert more, (self.rest, "closed before an answer")
            self.rest += more
        head, _, body = self.rest.partition(b"\r\n\r\n")
        self.head = head
        length = re.search(rb"content-length: (\d+)", head)
        assert length, head
        while len(body) < int(length[1]):
            more = await self.receive()
            assert more, (self.rest, "closed amid an answer")
            body += more
        self.rest = body[int(length[1]) :]
        return int(head.split()[1]), body[: int(length[1])]

    async def seen(self) -> dict[str, Any]:
        status, body = await self.answer()
        assert status == 200, body
        return json.loads(body)

    async def refused(self) -> tuple[int, str]:
        """A refusal in the envelope, and nothing behind it."""
        status, body = await self.answer()
        await self.closed()
        return status, json.loads(body)["error"]["message"]

    async def closed(self) -> float:
        """Nothing more comes, and the connection ends; the seconds until then."""
        started = time.monotonic()
        async with asyncio.timeout(LONGEST_S + LIMITS.write_timeout):
            assert self.rest + await self.receive() == b""
        self.socket.close()
        return time.monotonic() - started

    async def reset(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()


def on_loop(test: Callable[[Server], Awaitable[None]], limits: ProtocolLimits = LIMITS) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), Server(limits).listening() as server:
            await test(server)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def get(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "host: x", *lines, "", ""]).encode()


ANSWERED = get("/1")
POST = b"POST /2 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
EARLY = b"POST /early HTTP/1.1\r\nhost: x\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
NINE = b"content-length: 9\r\n\r\n"
OFFER = b"connection: upgrade\r\nupgrade: h2c\r\n"
UNFINISHED: dict[str, tuple[list[bytes], list[int]]] = {
    "nothing": ([], []),
    "blank lines": ([b"\r\n", b"\r\n\r\n"], []),
    "half a request line": ([b"GE"], [408]),
    "half a head": ([ANSWERED[:-2]], [408]),
    "no body": ([POST + NINE], [408]),
    "half a body": ([POST + NINE, b"x"], [408]),
    "half a chunk": ([POST + CHUNKED + b"9\r\n", b"x"], [408]),
    "half a trailer": ([POST + CHUNKED + b"0\r\na: b"], [408]),
    "half a body behind an offer": ([POST + OFFER + NINE, b"x"], [408]),
    "an answer": ([ANSWERED], [200]),
    "an answer, then a blank line": ([ANSWERED, b"\r\n"], [200]),
    "an answer, then half of one": ([ANSWERED, b"\r"], [200]),
    "an answer, then half a head": ([ANSWERED, b"GET / HT"], [200, 408]),
    "an answer before the body": ([EARLY + NINE], [200]),
    "an answer before a byte of the body": ([EARLY + NINE, b"x"], [200]),
    "an answer before half a chunk": ([EARLY + CHUNKED, b"9\r\n", b"x"], [200]),
    "an answer before what is no chunk": ([EARLY + CHUNKED, b"x\r\n"], [200]),
    "an answer before half a body behind an offer": ([EARLY + OFFER + NINE, b"x"], [200]),
    "the last answer before its body": ([EARLY + b"connection: close\r\n" + NINE, b"x"], [200]),
    "two answers, one before its body": ([ANSWERED + EARLY + NINE, b"x"], [200, 200]),
    "an answer, then no request": ([ANSWERED, b"hello\r\n\r\n"], [200, 400]),
}


def test_no_connection_outlives_its_time_limits() -> None:
    """And it has exactly one timer all the while, for no request runs."""

    async def one(server: Server, name: str) -> None:
        pieces, statuses = UNFINISHED[name]
        client = await Client.to(server)
        timers = await server.timers_of(client)
        for piece in pieces:
            await client.send(piece)
            await asyncio.sleep(0.05)
            # At once, but for the app's own moment; and some are closed soon.
            await until(lambda: timers.armed == 1 or server.has_lost(timers))
        started = time.monotonic()
        assert [(await client.answer())[0] for _ in statuses] == statuses, name
        await client.closed()
        assert time.monotonic() - started < LONGEST_S, name

    async def test(server: Server) -> None:
        await asyncio.gather(*(one(server, name) for name in UNFINISHED))

    on_loop(test)


def test_a_byte_now_and_then_keeps_nothing_open() -> None:
    async def drip(server: Server, start: bytes, drop: bytes) -> None:
        client = await Client.to(server)
        await client.send(start)
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 2 * LONGEST_S:
                await asyncio.sleep(0.05)
                await client.send(drop)
        assert time.monotonic() - started < LONGEST_S, start
        client.socket.close()

    async def test(server: Server) -> None:
        drops = {b"": b"\r\n", ANSWERED: b"\r\n", ANSWERED[:-1]: b"\r", POST: b"x"}
        drops |= dict.fromkeys((POST + CHUNKED, EARLY + CHUNKED), b"1\r\nx\r\n")
        await asyncio.gather(*(drip(server, start, drop) for start, drop in drops.items()))

    on_loop(test)


def test_the_server_s_own_time_is_not_the_client_s() -> None:
    """Nothing is armed while a request runs, nor is a half one behind it timed."""

    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(get("/wait") + ANSWERED[:9])
        await asyncio.sleep(1.5 * LIMITS.header_timeout)
        assert (await server.timers_of(client)).armed == 0
        server.released.set()
        await client.seen()
        await client.send(ANSWERED[9:])
        assert (await client.seen())["path"] == "/1"
        await client.closed()

    on_loop(test)


def test_who_does_not_read_is_cut_off() -> None:
    """Amid an answer, behind one that is complete, and where the connection is to end."""

    async def test(server: Server) -> None:
        large = get("/large-9000000")
        last = get("/large-9000000", "connection: close")
        for sent in (large, last, large + ANSWERED[:-2], large + ANSWERED * 100):
            client = await Client.to(server, receive_buffer=4096)
            await server.timers_of(client)
            started = time.monotonic()
            await client.send(sent)
            await until(lambda: not server.state.connections)
            assert LIMITS.write_timeout < time.monotonic() - started < LONGEST_S
            client.socket.close()

    on_loop(test)


class StuckTransport(asyncio.Transport):
    """What is written to it never arrives, so it never ends when it is closed."""

    closing = aborted = False

    def write(self, data: object) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


@pytest.mark.parametrize("ending", ["last answer", "keep-alive", "refusal", "shutdown", "eof"])
def test_a_close_that_does_not_end_is_cut_short(ending: str) -> None:
    """A few bytes that nobody takes are no reason to pause the writing, and hold up the close."""

    async def test(server: Server) -> None:
        protocol, transport = server.make(), StuckTransport()
        protocol.connection_made(transport)
        last = ["connection: close"] if ending == "last answer" else []
        protocol.data_received(get("/1", *last))
        await until(lambda: protocol.cycle.response_complete)
        if ending == "refusal":
            protocol.data_received(b"hello\r\n\r\n")
        elif ending == "shutdown":
            protocol.shutdown()
        elif ending == "eof":
            protocol.eof_received()
        await until(lambda: transport.aborted)
        assert server.timers[0].armed == 0
        protocol.connection_lost(None)

    on_loop(test)


# Offers, trailers, hosts

OFFERS = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
    "tls": b"Connection: Upgrade\r\nUpgrade: TLS/1.2\r\n",
    "websocket": b"upgrade: websocket\r\nconnection: keep-alive, upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "unknown": b"connection: upgrade\r\nupgrade: foo\r\n",
    "several": b"connection: upgrade\r\nupgrade: foo/2, bar\r\nupgrade: h2c\r\n",
}
INNER = b'{"a": "\r\n\r\nGET /info HTTP/1.1\r\nhost: inner\r\n\r\n"}'
FRAMED = {
    "length": b"content-length: %d\r\n\r\n%s" % (len(INNER), INNER),
    "chunks": CHUNKED
    + b"8;a=b\r\n%s\r\n%x\r\n%s\r\n0\r\nx: y\r\n\r\n" % (INNER[:8], len(INNER) - 8, INNER[8:]),
}


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("framing", FRAMED)
def test_an_offer_to_upgrade_is_ignored(offer: str, framing: str) -> None:
    """RFC 9110, 7.8: the request is served as if it was not made, and so are those behind it."""

    async def test(server: Server) -> None:
        request = POST + OFFERS[offer] + FRAMED[framing]
        bare = ANSWERED.replace(b"host", OFFERS[offer] + b"host")
        head = request.index(b"\r\n\r\n") + 4
        client = await Client.to(server)
        for pieces in ([request], [request[:head], request[head:]], [request[:-1], request[-1:]]):
            await client.send(*pieces)
            seen = await client.seen()
            assert (seen["path"], seen["body"]) == ("/2", INNER.decode())
        await client.send(request + bare + EARLY + OFFERS[offer] + FRAMED[framing] + request)
        paths = [(await client.seen())["path"] for _ in range(4)]
        assert paths == ["/2", "/1", "/early", "/2"]
        assert server.requests == 7
        client.socket.close()

    on_loop(test)


@pytest.mark.parametrize("target", [b"x:443", b"/v1/embeddings", b"http://x/"])
def test_connect_is_refused_and_nothing_is_tunnelled(target: bytes) -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(b"CONNECT %s HTTP/1.1\r\nhost: x\r\n\r\n" % target + ANSWERED)
        assert await client.refused() == (400, "CONNECT is for proxies")
        assert (server.requests, server.refusals) == (0, [400])

    on_loop(test)


@pytest.mark.parametrize(
    "trailer",
    [
        *(b"authorization: Bearer key", b"content-type: text/plain", b"x-request-id: 1"),
        *(b"x-stainless-read-timeout: 1", b"expect: 100-continue", b"host: y", b"a: b"),
    ],
)
def test_trailers_are_no_headers(trailer: bytes) -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        for offer in (b"", OFFER):
            await client.send(POST + offer + CHUNKED + b"2\r\n{}\r\n0\r\n" + trailer + b"\r\n\r\n")
            headers = dict((await client.seen())["headers"])
            assert headers["content-type"] == "application/json"
            assert headers["host"] == "x"
            if not trailer.startswith((b"content-type", b"host")):
                assert trailer.split(b":")[0].decode() not in headers
        client.socket.close()

    on_loop(test)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GET / HTTP/1.1\r\n", "The host header is missing"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n", "one host header"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nx: y\r\nhOST: b\r\n", "one host header"),
        (b"GET / HTTP/1.0\r\nhost: a\r\nhost: b\r\n", "one host header"),
        (b"GET http://a/ HTTP/1.1\r\n", "The host header is missing"),
        (b"GET / HTTP/1.1\r\nhost: a b\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nhost: a/b\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nhost: user@a\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nhost: a:b\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nhost: [::1\r\n", "malformed"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nauthorization: a\r\nAuthorization: b\r\n", "one auth"),
        (b"GET / HTTP/1.1\r\nhost: a\r\nauthorization: a\r\nauthorization: a\r\n", "one auth"),
        (b"GET /\r\n", "HTTP/0.9 is not spoken"),
        (b"GET / HTTP/0.9\r\n", "HTTP/0.9 is not spoken"),
        (b"GET / HTTP/2.0\r\nhost: a\r\n", "HTTP/2.0 is not spoken"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", "not an HTTP/1.1 request"),
        (b"GET / HTTP/1.2\r\nhost: a\r\n", "not an HTTP/1.1 request"),
    ],
)
def test_what_a_head_must_not_lack_or_repeat(head: bytes, message: str) -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(ANSWERED + head + b"\r\n")
        await client.seen()
        status, text = await client.refused()
        assert status == 400
        assert message in text
        assert server.requests == 1

    on_loop(test)


@pytest.mark.parametrize(
    "host",
    [b"", b"a", b"a.b-c_d:80", b"127.0.0.1:8000", b"[::1]:8000", b"[fe80::1]", b"a:", b"a \t"],
)
def test_legal_hosts_are_taken(host: bytes) -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(b"GET / HTTP/1.1\r\nhost: %s\r\n\r\n" % host)
        await client.seen()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        await client.seen()
        client.socket.close()

    on_loop(test)


# One request at a time, one answer each


def test_any_split_of_two_requests_gives_the_same_two_answers() -> None:
    """At every byte; the second is answered though its first bytes came with the other's last."""

    async def test(server: Server) -> None:
        first = POST + OFFERS["h2c"] + FRAMED["chunks"]
        stream = first + b"\r\n" + POST.replace(b"/2", b"/3") + FRAMED["length"]
        client = await Client.to(server)
        for cut in range(1, len(stream)):
            await asyncio.get_running_loop().sock_sendall(client.socket, stream[:cut])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.get_running_loop().sock_sendall(client.socket, stream[cut:])
            seen = [await client.seen(), await client.seen()]
            assert [one["path"] for one in seen] == ["/2", "/3"], cut
            assert [one["body"] for one in seen] == [INNER.decode()] * 2, cut
        client.socket.close()
        assert server.requests == 2 * (len(stream) - 1)

    on_loop(test)


def test_byte_by_byte() -> None:
    async def test(server: Server) -> None:
        protocol, transport = server.make(), StuckTransport()
        protocol.connection_made(transport)
        stream = POST + OFFERS["tls"] + FRAMED["chunks"] + POST + FRAMED["length"]
        for byte in stream:
            protocol.data_received(bytes([byte]))
        await until(lambda: server.requests == 2 and protocol.cycle.response_complete)
        protocol.connection_lost(None)

    on_loop(test)


def test_a_large_request_and_a_half_of_the_next_in_one_read() -> None:
    """The bytes of a body do not count as those of the head behind it."""

    async def test(server: Server) -> None:
        client, body = await Client.to(server), b"x" * 150_000
        head = ANSWERED[:-2] + b"x: " + b"y" * 15_000 + b"\r\n\r\n"
        await client.send(POST + b"content-length: %d\r\n\r\n" % len(body) + body + head + head)
        assert len((await client.seen())["body"]) == len(body)
        await client.seen()
        await client.seen()
        client.socket.close()

    on_loop(test)


def test_what_is_refused_waits_for_the_answers_before_it() -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(get("/wait") + b"hello\r\n\r\n" + ANSWERED)
        await asyncio.sleep(0.1)
        server.released.set()
        assert (await client.seen())["path"] == "/wait"
        assert (await client.refused())[0] == 400
        assert server.requests == 1

    on_loop(test)


def test_a_body_that_turns_bad_ends_its_request() -> None:
    """With the one answer that it gets; whoever works on it learns that nobody waits."""

    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(POST.replace(b"/2", b"/wait") + CHUNKED, b"zz\r\n" + ANSWERED)
        assert (await client.refused())[0] == 400
        assert server.requests == 1
        await until(lambda: not server.state.tasks)

    on_loop(test)


def test_nothing_behind_the_last_request_is_served() -> None:
    async def test(server: Server) -> None:
        for first in (get("/1", "connection: close"), ANSWERED.replace(b"1.1", b"1.0")):
            client = await Client.to(server)
            await client.send(first + ANSWERED)
            await client.seen()
            await client.closed()
        assert server.requests == 2

    on_loop(test)


def test_an_answer_before_a_large_body_is_not_lost() -> None:
    """With `connection: close` as well: the rest is read for a while, not answered by a reset."""

    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(EARLY + b"connection: close\r\ncontent-length: 3000000\r\n\r\n")
        await client.send(b"x" * 3_000_000)
        assert (await client.seen())["path"] == "/early"
        client.socket.close()

    on_loop(test)


# What is kept


def test_a_pipeline_is_held_not_parsed() -> None:
    """Megabytes of small requests on one connection: no more is read than one of them needs, all
    are answered in their order, and others do not wait."""

    async def test(server: Server) -> None:
        client, other = await Client.to(server), await Client.to(server)
        sent = b"".join(get(f"/{n}") for n in range(3000))
        await client.send(get("/wait"))
        sending = asyncio.create_task(client.send(sent * 100))  # 10 MB
        await asyncio.sleep(0.3)
        assert not sending.done()
        assert server.requests == 1
        protocol = server.connections[0]()
        assert protocol is not None
        assert not protocol.pipeline
        assert len(protocol._held) < 300_000
        await other.send(ANSWERED)
        await asyncio.wait_for(other.seen(), LONGEST_S)
        server.released.set()
        assert (await client.seen())["path"] == "/wait"
        paths = [(await client.seen())["path"] for _ in range(3000)]
        assert paths == [f"/{number}" for number in range(3000)]
        sending.cancel()
        client.socket.close()
        other.socket.close()

    on_loop(test, replace(PATIENT, max_connections=3))


@pytest.mark.parametrize(
    "endless",
    [
        ANSWERED[:-2] + b"x: ",
        b"GET /",
        POST + CHUNKED + b"2\r\n{}\r\n0\r\nx: ",
        POST + CHUNKED + b"1;",
        POST + OFFER + CHUNKED + b"0\r\nx: ",
    ],
)
def test_no_line_is_endless(endless: bytes) -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(endless + b"y" * 3 * LIMITS.max_header_bytes)
        status, text = await client.refused()
        assert (status, "headers are beyond 20000 bytes" in text) == (431, True)

    on_loop(test)


def test_many_trailers_are_refused() -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(POST + CHUNKED + b"0\r\n" + b"a: b\r\n" * LIMITS.max_header_bytes)
        assert (await client.refused())[0] == 431

    on_loop(test)


@pytest.mark.parametrize("flood", [b"1\r\nx\r\n", b"4\r\n\r\n\r\n\r\n", b"1;a=b\r\n\r\r\n"])
def test_a_body_of_tiny_pieces_takes_turns(flood: bytes) -> None:
    """A read of 256 KB may hold fifty thousand chunks: others are served between them."""

    async def longest_turn(server: Server) -> float:
        protocol = server.make()
        protocol.connection_made(StuckTransport())
        protocol.data_received(POST + CHUNKED)
        longest, started = 0.0, time.process_time()
        protocol.data_received(flood * (256_000 // len(flood)))
        protocol.data_received(b"0\r\n\r\n")
        while not protocol.cycle.response_complete:
            longest = max(longest, time.process_time() - started)
            started = time.process_time()
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        return longest

    async def test(server: Server) -> None:
        # Of the processor's time; a busy machine may stretch one of them, but not each.
        assert min([await longest_turn(server) for _ in range(5)]) < 0.05

    on_loop(test, replace(PATIENT, body_timeout=60))


@pytest.mark.parametrize("moment", ["idle", "answered", "head", "body", "running", "held"])
def test_a_reset_frees_everything_at_once(moment: str) -> None:
    """Without the help of the garbage collector, and no timer stays."""
    sent = {
        "idle": b"",
        "answered": ANSWERED,
        "head": ANSWERED[:-2] + b"x: " + b"y" * 9000,
        "body": POST + NINE + b"x",
        "running": get("/wait"),
        "held": get("/wait") + ANSWERED * 1000,
    }[moment]

    async def test(server: Server) -> None:
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                client = await Client.to(server)
                await client.send(sent)
                if moment == "answered":
                    await client.seen()
                await asyncio.sleep(0.01)
                await client.reset()
                await until(lambda: not server.state.connections)
            await until(lambda: not server.state.tasks)
            await asyncio.sleep(0.01)
            alive = [one for one in server.connections if one() is not None]
            assert len(alive) <= 1, len(alive)
        finally:
            gc.enable()

    on_loop(test)


def test_connections_beyond_the_cap_are_answered_and_bounded_too() -> None:
    """They may linger, but not by the thousand."""

    async def test(server: Server) -> None:
        kept = [await Client.to(server) for _ in range(2)]
        for client in kept:
            await client.send(ANSWERED)
            await client.seen()
        beyond = [await Client.to(server) for _ in range(300)]
        await until(lambda: len(server.connections) == 302)
        await asyncio.sleep(0)
        assert len(server.state.connections) <= 2 + 128
        statuses = {(await client.refused())[0] for client in beyond}
        assert statuses == {503}
        assert server.refusals == [503] * 300
        for client in kept:
            await client.send(ANSWERED)
            await client.seen()
            client.socket.close()

    on_loop(test, replace(PATIENT, max_connections=2))


def test_an_old_connection_s_next_answer_is_its_last() -> None:
    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(ANSWERED)
        await client.seen()
        await asyncio.sleep(0.45)
        assert not server.has_lost(await server.timers_of(client)), "it is idle: no request is lost"
        await client.send(ANSWERED, b"GET / HT")
        status, _ = await client.answer()
        assert (status, client.head.lower().count(b"connection: close")) == (200, 1)
        await client.closed()
        assert server.requests == 2

    on_loop(test, replace(PATIENT, max_connection_age=0.4))


def test_connections_that_came_together_do_not_grow_old_together() -> None:
    async def test(server: Server) -> None:
        clients = [await Client.to(server) for _ in range(40)]
        await until(lambda: len(server.connections) == 40)
        ages = [made._old_at for one in server.connections if (made := one()) is not None]
        assert len(ages) == 40
        assert 20 < max(ages) - min(ages) < 30, "100 s less up to a quarter"
        for client in clients:
            client.socket.close()

    on_loop(test, replace(PATIENT, max_connection_age=100.0))


# What is written


class _Written:
    """A transport that keeps what each call of the system would be given."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def writelines(self, pieces: list[bytes]) -> None:
        self.calls.append(b"".join(pieces))

    def is_closing(self) -> bool:
        return False


def test_head_and_body_of_an_answer_are_one_write() -> None:
    written = _Written()
    door = _Door(written, lambda: written.calls.append(b"the end"))  # type: ignore[arg-type]
    door.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert written.calls.pop() == b"HTTP/1.1 100 Continue\r\n\r\n"
    for _ in range(2):
        for piece in (b"head", b"body", b"more"):
            door.write(piece)
        door.answered()
        assert written.calls == [b"headbody", b"more"]
        written.calls.clear()
    door.write(b"head")
    door.close()
    assert written.calls == [b"head", b"the end"]


def test_a_head_alone_is_written() -> None:
    """Which no body's write takes along: the answer to HEAD, and that of an app which fails."""

    async def test(server: Server) -> None:
        client = await Client.to(server)
        await client.send(b"HEAD /1 HTTP/1.1\r\nhost: x\r\n\r\n")
        while b"\r\n\r\n" not in client.rest:
            client.rest += await client.receive()
        assert client.rest.startswith(b"HTTP/1.1 200 OK\r\n")
        assert client.rest.endswith(b"\r\n\r\n")
        client.rest = b""
        await client.send(get("/fail-early"))
        while b"\r\n\r\n" not in client.rest:
            client.rest += await client.receive()
        assert client.rest.startswith(b"HTTP/1.1 200 OK\r\n")
        client.rest = b""
        await client.closed()

    on_loop(test)


# What is uvicorn's


def test_what_of_uvicorn_is_overridden_or_used() -> None:
    """The release is pinned because of these: look at each of them when it is to be another."""
    assert uvicorn.__version__.startswith("0.54.")
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "uvicorn>=0.54,<0.55" in pyproject["project"]["dependencies"]
    own = {name for name in vars(LimitedProtocol) if not name.startswith("__")}
    assert own & set(dir(HttpToolsProtocol)) == {
        *("connection_made", "connection_lost", "data_received", "eof_received", "shutdown"),
        *("pause_writing", "resume_writing", "on_response_complete", "on_message_begin"),
        *("on_header", "on_headers_complete", "on_body", "on_message_complete"),
    }
    names = ["config", "server_state", "app_state", "_loop"]
    assert list(inspect.signature(HttpToolsProtocol).parameters) == names

    async def attributes() -> None:
        config = uvicorn.Config(lambda *_: None, log_config=None)
        config.load()
        protocol = HttpToolsProtocol(config, ServerState(), {})
        used = ["loop", "transport", "flow", "connections", "cycle", "scope", "headers", "parser"]
        assert not {*used, "pipeline", "server_state", "expect_100_continue"} - set(vars(protocol))

    asyncio.run(attributes())
    cycle = inspect.signature(RequestResponseCycle).parameters
    assert {"scope", "transport", "flow", "message_event", "on_response"} <= set(cycle)
    source = inspect.getsource(RequestResponseCycle)
    used = ["disconnected", "response_started", "response_complete", "more_body", "body"]
    assert all(f"self.{name} = " in source for name in used)
    assert set(re.findall(r"self\.transport\.(\w+)", source)) == {"write", "close", "is_closing"}
    assert {"resume_reading", "pause_reading"} <= set(vars(FlowControl))
    assert list(inspect.signature(FlowControl).parameters) == ["transport"]


def test_the_parser_tells_of_offers_as_is_assumed() -> None:
    """At the head's end, after it has said that the message is complete, body or no body."""
    events: list[str] = []

    class Target:
        def on_headers_complete(self) -> None:
            events.append("head" if not parser.should_upgrade() else "offer")

        def on_message_complete(self) -> None:
            events.append("complete")

    parser = httptools.HttpRequestParser(Target())
    with pytest.raises(httptools.HttpParserUpgrade):
        parser.feed_data(POST + OFFER + NINE)
    assert events == ["offer", "complete"]


async def until(predicate: Callable[[], object]) -> None:
    async with asyncio.timeout(LONGEST_S + 2):
        while not predicate():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
