"""Within the log: asks for a key, and answers what nobody foresaw."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.openai_errors import error_response
from server.api.request_context import RequestContext, context_of
from server.errors import InternalError, InvalidKeyError

logger = logging.getLogger("nv_embed.access")


class Gate:
    """ASGI layer over all routes."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[bytes], open_paths: frozenset[str]) -> None:
        self._app, self._open_paths = app, open_paths
        self._keys = [hashlib.sha256(key).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = context_of(scope)
        if refusal := self._refusal(context):
            await error_response(refusal)(scope, receive, send)
            return
        answered = False

        async def watched_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        except Exception:
            request_id = context.request_id
            logger.exception("a request failed", extra={"request_id": request_id})
            if not answered:
                error = InternalError(f"The server failed; see its log at request {request_id}")
                await error_response(error)(scope, receive, send)

    def _refusal(self, context: RequestContext) -> InvalidKeyError | None:
        if not self._keys or context.route_path in self._open_paths:
            return None
        given = context.headers.get(b"authorization")
        if given is None:
            return InvalidKeyError("You didn't provide an API key: send Authorization: Bearer KEY")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in constant time.
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme.lower() == b"bearer" and any(found):
            return None
        return InvalidKeyError("Incorrect API key provided")
