"""What one request carries with it from layer to layer, besides what ASGI gives it.

The outermost layer makes it; dialects read it, add to its log line, and count what they hold.
"""

from __future__ import annotations

import time
from asyncio import Future
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from model.families import Side
from server.api.byte_budget import Reservation
from server.api.vector_format import VectorFormat

_KEY = "nv_embed.context"
_EXTENSION = "nv_embed.disconnect"


@dataclass(slots=True)
class StageTimes:
    """Where the time of a traced request went."""

    seconds: tuple[float, ...] = ()
    """For its tokens, for its turn, and from then to its last vector, as far as there were."""
    ended: float = 0.0
    """When the last of them did, on time.monotonic's clock."""
    how: VectorFormat | None = None
    """How its vectors are written."""

    def add(self, seconds: tuple[float, ...], how: VectorFormat | None = None) -> None:
        """They have just ended."""
        self.seconds, self.ended, self.how = seconds, time.monotonic(), how


@dataclass(slots=True)
class RequestContext:
    """One request's."""

    request_id: str
    headers: dict[bytes, bytes]
    """By name, for searching ASGI's list takes long. Of equal names the last one counts."""
    route_path: str
    """The path without the prefix that a proxy may have left in front."""
    memory: Reservation
    """The bytes that the request holds until it is answered."""
    side: Side | None = None
    """Which side its path asks for, in front of the route's own."""
    key_name: str = ""
    """Of the key that it came with, if that has one."""
    serialize_seconds: float = 0.0
    """How long its answer took to write as JSON."""
    times: StageTimes | None = None
    """Of one that is traced."""
    log: dict[str, Any] = field(default_factory=dict)
    """What its log line says besides."""


def put_context(scope: Scope, context: RequestContext) -> None:
    scope[_KEY] = context


def context_of(scope: Scope) -> RequestContext:
    """The context of the request that this scope belongs to."""
    context = scope[_KEY]
    assert isinstance(context, RequestContext), context
    return context


def disconnect_extension(gone: Future[None]) -> dict[str, dict[object, object]]:
    """ASGI's `extensions` of a server that can tell: `gone` is done when the client has left."""
    return {_EXTENSION: {"gone": gone}}


def disconnect_of(scope: Scope) -> Future[None] | None:
    """The server's word for it; None under one that only answers `receive`."""
    offered = (scope.get("extensions") or {}).get(_EXTENSION)
    if offered is None:
        return None
    gone = offered["gone"]
    assert isinstance(gone, Future), gone
    return gone
