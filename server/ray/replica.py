"""One replica: the front's application over an engine with one worker, from its start to its end.

Imports nothing of Ray.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any, Self

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.hub import ModelSource, locate
from model.platform import resources
from server import interpreter, logs
from server.engine.engine import EmbeddingEngine
from server.errors import UnavailableError
from server.http.app import create_app
from server.ray.metrics import Instruments, Mirror
from server.ray.settings import ReplicaSettings, read

_REQUEST_ID = b"x-request-id"
_LOOK_S = 0.05


class Replica:
    """A server without a listener: `app` is what Ray calls."""

    def __init__(self, settings: ReplicaSettings, source: ModelSource) -> None:
        """Raises SettingsError or CheckpointError."""
        self._settings = settings
        self._engine = engine = EmbeddingEngine(settings, source)
        self.app: ASGIApp = OneRequestId(create_app(settings, engine, engine.metrics))
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def started(cls, args: Mapping[str, Any], instruments: Instruments) -> Self:
        """One that can serve. args: see server/ray/settings.py; read in the replica's own process,
        for there is the environment that counts.

        Raises SettingsError, CheckpointError or StartError.
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
        replica = cls(settings, source)
        interpreter.prepare()
        await replica._start(instruments)
        return replica

    async def _start(self, instruments: Instruments) -> None:
        self._engine.start()
        mirror = Mirror(self._engine.metrics.registry, instruments)
        self._failing = asyncio.create_task(self._engine.failed())
        self._tasks = [self._failing, asyncio.create_task(mirror.keep())]
        try:
            while self._engine.not_ready:
                self._raise_failure()
                await asyncio.sleep(_LOOK_S)
        except BaseException:
            await self._end()
            raise

    def check_health(self) -> None:
        """Raises UnavailableError while no request should be sent here, StartError when it is of
        no use to wait."""
        self._raise_failure()
        if reason := self._engine.not_ready:
            raise UnavailableError(f"not ready: {reason}")

    async def stop(self) -> None:
        """Answer what was accepted, and end the worker."""
        await self._engine.drain(self._settings.drain_timeout)
        await self._end()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
