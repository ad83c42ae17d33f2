"""Who may come in: asks for a key where one is needed, and notes its name."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.request_context import RequestContext, context_of
from server.api_keys import ApiKey
from server.errors import InvalidKeyError

_KEY_HEADERS = (b"api-key", b"x-api-key")


class Gate:
    """ASGI layer around all routes. Raises InvalidKeyError."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[ApiKey],
        open_paths: frozenset[str],
        pages: frozenset[str],
    ) -> None:
        """pages: paths whose GET needs no key: a browser cannot send one before the page has
        asked for it, and what they show comes by requests of their own."""
        self._app, self._open_paths, self._pages = app, open_paths, pages
        self._keys = [(hashlib.sha256(one.key).digest(), one.name) for one in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys:
            self._check(context_of(scope), scope["method"])
        await self._app(scope, receive, send)

    def _check(self, context: RequestContext, method: str) -> None:
        if context.route_path in self._open_paths:
            return
        if method == "GET" and context.route_path in self._pages:
            return
        digest = hashlib.sha256(_key_of(context.headers)).digest()
        # Every key is compared, each in constant time.
        found = [name for known, name in self._keys if hmac.compare_digest(digest, known)]
        if not found:
            raise InvalidKeyError("Incorrect API key provided")
        if found[0]:
            context.key_name = context.log["key"] = found[0]


def _key_of(headers: Mapping[bytes, bytes]) -> bytes:
    """As a bearer, or in the headers of Azure's clients and others. Raises InvalidKeyError."""
    given = headers.get(b"authorization")
    if given is not None:
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"bearer":
            return key.strip()
    for name in _KEY_HEADERS:
        if name in headers:
            return headers[name].strip()
    if given is None:
        raise InvalidKeyError("You didn't provide an API key: send Authorization: Bearer KEY")
    raise InvalidKeyError("Incorrect API key provided")
