"""Work for a client that has gone is ended; and how long one that stays will wait."""

from __future__ import annotations

import asyncio
import math

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.api.request_context import context_of, disconnect_of

DEADLINE_HEADERS = {
    b"x-stainless-read-timeout": 1.0,
    b"x-stainless-timeout": 1.0,
    b"request-timeout-ms": 1e-3,
}
"""After how long a client gives up, with the unit in seconds: OpenAI's Python and Node SDKs, and
Baseten's."""


def patience(request: Request) -> float:
    """Seconds that the client waits for its answer, by the SDKs' headers; else for ever."""
    headers = context_of(request.scope).headers
    for name, unit in DEADLINE_HEADERS.items():
        given = headers.get(name)
        if given is None:
            continue
        try:
            seconds = float(given) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return math.inf


class cancelled_on_disconnect:  # noqa: N801  (a context manager)
    """Cancel the block when the client goes away, and raise ClientDisconnect in its place.

    The body must have been read. Our own HTTP server tells of a disconnect by a future; under any
    other one a task waits for ASGI's message.
    """

    __slots__ = ("_gone", "_inside", "_left", "_listener", "_task")

    def __init__(self, request: Request) -> None:
        gone = disconnect_of(request.scope)
        self._listener = None
        if gone is None:
            gone = self._listener = asyncio.ensure_future(_disconnected(request.receive))
        self._gone, self._inside, self._left = gone, True, False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._gone.add_done_callback(self._leave)

    def _leave(self, _: asyncio.Future[None]) -> None:
        if self._inside:  # the block may have ended since this was scheduled
            self._left = True
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._inside = False
        self._gone.remove_done_callback(self._leave)
        if self._listener is not None:
            self._listener.cancel()
        if kind is asyncio.CancelledError and self._left and not self._task.uncancel():
            raise ClientDisconnect from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
