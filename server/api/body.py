"""A request's body: bytes within the limits, and those bytes as wire types.

Owns what is refused before anything is read into objects. A large body becomes objects on a thread,
so that the event loop never stands still for one.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from fastapi import Request
from starlette.requests import ClientDisconnect

from server.api import json_fields, parsing
from server.api.byte_budget import ByteBudgetError
from server.api.disconnects import cancelled_on_disconnect
from server.api.hints import ignored_names
from server.api.request_context import context_of
from server.errors import BodyTooLargeError, OverloadedError, UnsupportedMediaTypeError
from server.turns import Turns

IGNORED_HEADER = "x-ignored-fields"
"""Names the fields of a body that nobody knows; most of them are a misspelt one."""
_DISCARD_FACTOR = 4
"""Bodies up to so many times the limit are read to their end and dropped before the 413: a client
that is still sending would see a broken connection instead."""
_JSON = b"application/json"
_UTF8_NAMES = (b"utf-8", b"utf8", b"us-ascii", b"ascii")


class BodyReader:
    """Reads the bodies of one server."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # One thread: large bodies compete with the event loop once, not twice.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")

    async def read(
        self, request: Request, wire: type[parsing.WireT]
    ) -> tuple[parsing.WireT, dict[str, str]]:
        """-> (the body, headers for its answer). Raises ServerErrors and ClientDisconnect."""
        body = await _read_body(request, self._max_bytes)
        if len(body) <= json_fields.STEP:
            fields, unknown = parsing.read_body(wire, body)
        else:
            work = partial(parsing.read_body, wire, body, Turns().wait)
            with cancelled_on_disconnect(request):
                loop = asyncio.get_running_loop()
                fields, unknown = await loop.run_in_executor(self._thread, work)
        if not unknown:
            return fields, {}
        context_of(request.scope).log["ignored_fields"] = len(unknown)
        return fields, {IGNORED_HEADER: ignored_names(unknown, parsing.known_fields(wire))}


def hold(request: Request, size: int) -> None:
    """Count bytes that this request keeps in memory until it is answered.

    Raises OverloadedError when all requests together hold too many.
    """
    try:
        context_of(request.scope).memory.add(size)
    except ByteBudgetError:
        raise OverloadedError(
            "too many bytes of requests and answers are in flight", retry_after=1
        ) from None


async def _read_body(request: Request, limit: int) -> bytes | bytearray:
    """The whole body. Raises UnsupportedMediaTypeError or BodyTooLargeError."""
    header = context_of(request.scope).headers
    if (media_type := header.get(b"content-type", _JSON)) != _JSON:
        _check_media_type(media_type)
    coding = header.get(b"content-encoding", b"").strip().lower()
    if coding not in (b"", b"identity"):
        raise UnsupportedMediaTypeError(
            f"The body came with Content-Encoding: {_shown(coding)}, which this server does not "
            "decode: send it as it is, without that header"
        )
    length = header.get(b"content-length", b"0")
    if length.isdigit() and int(length) > _DISCARD_FACTOR * limit:
        raise _too_large(limit)
    body: bytes | bytearray = b""
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(part)
        if size <= limit:
            hold(request, len(part))
            if not body:
                body = part
            elif part:
                body = bytearray(body) if isinstance(body, bytes) else body
                body += part
        elif size > _DISCARD_FACTOR * limit:
            raise _too_large(limit)
        else:
            body = b""
    if size > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The body is larger than {limit} bytes: send fewer inputs")


def _check_media_type(given: bytes) -> None:
    """Raises UnsupportedMediaTypeError for what is not JSON in UTF-8.

    JSON has no parameter `charset` and is UTF-8 (RFC 8259, sections 8.1 and 11). A client that
    names another encoding says that its bytes mean other characters, and some of them are valid
    UTF-8 nevertheless (UTF-7, HZ, much of Latin-1): their vectors would be those of other texts.
    """
    media_type, _, parameters = given.partition(b";")
    media_type = media_type.strip().lower()
    if media_type != _JSON and not media_type.endswith(b"+json"):
        came = f", and it came as {_shown(given)}" if given else ""
        raise UnsupportedMediaTypeError(
            f"The body must be JSON{came}: send the header Content-Type: application/json"
        )
    for parameter in parameters.split(b";"):
        name, _, value = parameter.partition(b"=")
        if name.strip().lower() == b"charset" and value.strip(b' \t"').lower() not in _UTF8_NAMES:
            raise UnsupportedMediaTypeError(
                f"The body must be UTF-8, as all JSON is, and it came as {_shown(given)}: send it "
                "as UTF-8, with the header Content-Type: application/json"
            )


def _shown(value: bytes) -> str:
    """A header's value in a message."""
    return ascii(value[:100].decode("latin-1"))
