"""Work for a client that has gone is ended; and how long one that stays will wait."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Iterator

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


@contextlib.contextmanager
def cancelled_on_disconnect(request: Request) -> Iterator[None]:
    """Cancel the block when the client goes away, and raise ClientDisconnect in its place.

    The body must have been read. Our own HTTP server tells of a disconnect by a future; under any
    other one a task waits for ASGI's message.
    """
    gone = disconnect_of(request.scope)
    listener = None
    if gone is None:
        gone = listener = asyncio.ensure_future(_disconnected(request.receive))
    task = asyncio.current_task()
    assert task is not None
    inside, left = True, False

    def leave(_: asyncio.Future[None]) -> None:
        nonlocal left
        if inside:  # the block may have ended since this was scheduled
            left = True
            task.cancel()

    gone.add_done_callback(leave)
    try:
        yield
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        inside = False
        gone.remove_done_callback(leave)
        if listener is not None:
            listener.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
