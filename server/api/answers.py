"""A large answer in pieces: made between turns of the event loop, sent as fast as it is read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from server.api.request_context import RequestContext, context_of, disconnect_of

_SHORT_ANSWER = 32 * 1024
"""Values of an answer that is written at once."""
_WHOLE_ANSWER = 256 * 1024
"""Values of an answer that is sent at once, with its length in front: larger ones are sent as they
are written, and never in memory as a whole."""
_JSON = "application/json"
_JSON_TYPE = (b"content-type", _JSON.encode())


TIMING_HEADER = "server-timing"
"""W3C's Server-Timing, which browsers' tools and proxies' logs show; in milliseconds."""


def timing(stages: tuple[float, float, float]) -> str:
    """Of an EmbedResult's stages. Writing comes behind, unless the answer is sent in pieces."""
    tokenize, queue, forward = stages
    return (
        f"tokenize;dur={tokenize * 1e3:.2f}, queue;dur={queue * 1e3:.2f}, "
        f"forward;dur={forward * 1e3:.2f}"
    )


class AnswerWriter:
    """Writes the answers of one server."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()  # one piece of one large answer between two turns of the loop

    async def response(
        self, request: Request, pieces: Iterator[bytes], values: int, headers: dict[str, str]
    ) -> Response:
        """JSON that comes in pieces and holds about so many values."""
        context = context_of(request.scope)
        if values <= _SHORT_ANSWER:
            began = time.monotonic()
            body = b"".join(pieces)
            context.serialize_seconds = seconds = time.monotonic() - began
            if TIMING_HEADER in headers:
                headers[TIMING_HEADER] += f", write;dur={seconds * 1e3:.2f}"
            return _DrainedResponse(body, headers)
        paced = self._paced(pieces, context)
        if values <= _WHOLE_ANSWER or request.scope["http_version"] == "1.0":  # has no pieces
            whole = b"".join([piece async for piece in paced])
            return _DrainedResponse(whole, headers)
        return _AnswerInPieces(paced, headers)

    async def _paced(
        self, pieces: Iterator[bytes], context: RequestContext
    ) -> AsyncIterator[bytes]:
        """Each piece is made in a turn of the event loop in which no other such piece is made."""
        while True:
            async with self._turn:
                began = time.monotonic()
                piece = next(pieces, None)
                context.serialize_seconds += time.monotonic() - began
                await asyncio.sleep(0)
            if piece is None:
                return
            yield piece


class _DrainedResponse(Response):
    """Ends only when the client has taken most of it: uvicorn waits before the second send. What
    is below its high-water mark it does not wait for. Names of headers are in lower case."""

    def __init__(self, body: bytes, headers: dict[str, str]) -> None:
        self.status_code, self.body, self.background = 200, body, None
        length = (b"content-length", b"%d" % len(body))
        given = [(name.encode("latin-1"), headers[name].encode("latin-1")) for name in headers]
        self.raw_headers = [length, _JSON_TYPE, *given]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        large = len(self.body) > HIGH_WATER_LIMIT
        await send({"type": "http.response.body", "body": self.body, "more_body": large})
        if large:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class _AnswerInPieces(Response):
    """Sends each piece when it is made, waiting while the client is slow to read; ends early when
    the client has gone."""

    def __init__(self, pieces: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(headers=headers, media_type=_JSON)
        del self.headers["content-length"]  # nobody knows it yet
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = disconnect_of(scope)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            if gone is not None and gone.done():
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
