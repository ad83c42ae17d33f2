"""The app without a socket, a worker or torch: an engine that computes what can be checked, and the
application over it in this process.

httpx's ASGI transport stands in for the HTTP server, so what `server/http/connection.py` and
uvicorn do (time limits, chunks, a client that leaves) is not there: tests of those start a process.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from model.batch import Encoding, RunnerInfo, num_tokens
from model.families import NV_EMBED
from model.fingerprint import fingerprint
from model.hub import locate
from model.tokenizer import NVEmbedTokenizer
from server import logs
from server.engine.averaging import averaged
from server.engine.inputs import InputTokenizer
from server.engine.interface import EmbedJob, EmbedResult, EngineLimits
from server.engine.metrics import Metrics
from server.http.app import create_app
from server.settings import Settings
from tests.server.clients import Asking
from tests.server.runners import WIDTH, vector_of


class FakeEngine:
    """An Engine of server/engine/interface.py: the real tokenizer and its refusals, and for each
    input `vector_of` its ids, repeated up to `dimensions`."""

    def __init__(self, model: Path, settings: Settings, *, dimensions: int = WIDTH) -> None:
        self.source = locate(str(model))
        self.family = NV_EMBED
        self.prompts: dict[str, str] = {}
        self.dimensions = dimensions
        self.matryoshka_dimensions: tuple[int, ...] = ()
        self.fingerprint = fingerprint(model)
        most = settings.max_input_tokens or 32_768
        self.limits = EngineLimits(most, settings.max_queued_tokens, (1024,))
        self.runners = [RunnerInfo("cpu", "fake", "float32", "none", "fake", dimensions)]
        self.not_ready: str | None = None
        self.draining = False
        self._inputs = InputTokenizer(NVEmbedTokenizer.from_dir(model), most, settings.truncate)

        self.stages = (0.0, 0.0, 0.0)
        """What an answer says of itself."""
        self.key_names: list[str] = []
        """Of the keys that jobs came with."""
        self.jobs: list[EmbedJob] = []
        """What came, in order."""
        self.error: BaseException | None = None
        """Raised in place of an answer."""
        self.open = asyncio.Event()
        """While it is clear, what comes waits."""
        self.open.set()
        self.cancelled = 0
        """Calls that were cancelled while they waited."""

    async def embed(self, job: EmbedJob, key_name: str = "") -> EmbedResult:
        self.key_names.append(key_name)
        encodings = await self.tokenize(job)
        rows = [vector_of(encoding.ids) for encoding in encodings]
        times = self.dimensions // WIDTH
        vectors = [np.tile(row, times) / np.float32(np.sqrt(times)) for row in rows]
        cut = tuple(index for index, encoding in enumerate(encodings) if encoding.is_cut)
        spans = [encoding.span for encoding in encodings if encoding.span is not None]
        tokens = num_tokens(encodings)
        return EmbedResult(averaged(encodings, vectors), tokens, cut, spans, self.stages)

    async def tokenize(self, job: EmbedJob) -> list[Encoding]:
        self.jobs.append(job)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return self._inputs.tokenize(job.inputs, job.options)


class AppInProcess(Asking):
    """The app over a FakeEngine, on an event loop in a thread. What asks is a plain httpx.Client,
    as of a real server."""

    def __init__(
        self, app: FastAPI, engine: FakeEngine, loop: asyncio.AbstractEventLoop, log: io.StringIO
    ) -> None:
        self.app, self.engine, self.loop, self._log = app, engine, loop, log
        self.url = "http://in-process"
        self.client = self.new_client()

    def new_client(self, **options: Any) -> httpx.Client:
        return httpx.Client(transport=_InLoop(self.app, self.loop), base_url=self.url, **options)

    def call(self, function: Callable[[], object]) -> None:
        """Call it on the loop, where the engine's events live."""
        self.loop.call_soon_threadsafe(function)

    @property
    def log(self) -> str:
        return self._log.getvalue()


class _InLoop(httpx.BaseTransport):
    """httpx's ASGI transport, which is asynchronous, for a client that is not."""

    def __init__(self, app: FastAPI, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport = httpx.ASGITransport(app=app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(self._handle(request), self._loop).result(60)

    async def _handle(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        pieces = _Pieces(list(request.stream))
        inner = httpx.Request(request.method, request.url, headers=request.headers, stream=pieces)
        answer = await self._transport.handle_async_request(inner)
        body = httpx.ByteStream(await answer.aread())
        return httpx.Response(answer.status_code, headers=answer.headers, stream=body)


class _Pieces(httpx.AsyncByteStream):
    """A body as it was cut."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


@contextmanager
def in_process(
    model: Path,
    *,
    dimensions: int = WIDTH,
    log_format: str = "text",
    tracebacks: int = 0,
    traces: Any = None,
    **options: Any,
) -> Iterator[AppInProcess]:
    """The app of `nv-embed serve` with these settings, over a FakeEngine; its log must hold so
    many tracebacks in the end. traces: what takes its spans, as a TraceExport does."""
    settings = Settings(**{"token_ids": "model", **options})  # most tests know inputs by their ids
    engine = FakeEngine(model, settings, dimensions=dimensions)
    app = create_app(settings, engine, Metrics(), traces)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="app", daemon=True)
    thread.start()
    with logged(log_format, thread.ident) as log:
        server = AppInProcess(app, engine, loop, log)
        try:
            yield server
        finally:
            server.client.close()
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)
            loop.close()
    assert log.getvalue().count("Traceback") == tracebacks, log.getvalue()


@contextmanager
def logged(log_format: str = "text", thread: int | None = None) -> Iterator[io.StringIO]:
    """What the server's loggers say from "info" on, as `nv-embed serve` would write it; in one
    thread, for several apps may run at a time."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(logs._JsonFormatter() if log_format == "json" else logs._TextFormatter())
    handler.addFilter(lambda _: thread in (None, threading.get_ident()))
    logger = logging.getLogger("nv_embed")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield log
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
