"""One replica of Ray Serve: the front's application over an engine with one worker.

Ray listens, routes, asks for its health and ends it. Knows Ray by what it calls alone, and imports
nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.hub import locate
from model.platform import resources
from server import logs
from server.engine.engine import EmbeddingEngine
from server.errors import UnavailableError
from server.http.app import create_app
from server.ray.metrics import Instruments, Mirror
from server.ray.settings import read

logger = logging.getLogger("nv_embed.ray")

_REQUEST_ID = b"x-request-id"
_LOOK_S = 0.05


class Replica:
    """What Serve's deployment is made of. Its methods are those that Serve looks for."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, args: Mapping[str, Any], instruments: Instruments
    ) -> None:
        """Returns when a request can be served. args: see server/ray/settings.py; read here once
        more, for only here is the environment the one that counts.

        Raises SettingsError, CheckpointError or StartError, of which Ray tells.
        """
        settings = read(args, os.environ)
        logs.configure_own(settings.log_format, settings.log_level)
        resources.let_waiting_threads_sleep()
        source = await asyncio.to_thread(
            locate,
            settings.model,
            revision=settings.revision,
            offline=settings.offline,
            family=settings.family,
        )
        self._engine = engine = EmbeddingEngine(settings, source)
        self._drain_timeout = settings.drain_timeout
        self._app = OneRequestId(create_app(settings, engine, engine.metrics))
        engine.start()
        self._failing = asyncio.create_task(engine.failed())
        try:
            while engine.not_ready:
                self._raise_failure()
                await asyncio.sleep(_LOOK_S)
        except BaseException:
            await self._stop()
            raise
        self._mirroring = asyncio.create_task(Mirror(engine.metrics.registry, instruments).keep())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Of @serve.ingress without an app, which could not know the engine."""
        return self._app

    def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica for which this raises three times."""
        self._raise_failure()
        if reason := self._engine.not_ready:
            raise UnavailableError(f"not ready: {reason}")

    async def __del__(self) -> None:
        """Serve awaits it once nobody routes here any more and all requests have ended."""
        if not hasattr(self, "_engine"):
            return
        await self._engine.drain(self._drain_timeout)
        await self._stop()

    async def _stop(self) -> None:
        tasks = [self._failing, *([self._mirroring] if hasattr(self, "_mirroring") else [])]
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._engine.stop()

    def _raise_failure(self) -> None:
        if self._failing.done():
            self._failing.result()


class OneRequestId:
    """ASGI layer: Ray gives each request an id unless it brings one, which is the one that our log
    line has, too, and answers with it. So our answers leave it out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                message["headers"] = [one for one in headers if one[0] != _REQUEST_ID]
            await send(message)

        await self._app(scope, receive, send_without_id)
