"""One server process from start to end: listen, start the workers, serve, drain, stop.

Owns the signals. The first SIGINT or SIGTERM drains, a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import stat
from collections.abc import Iterator
from types import FrameType

import uvicorn
import uvloop

from model.hub import ModelSource
from server.app import create_app
from server.engine import EmbeddingEngine
from server.errors import SettingsError, StartError
from server.handshake import with_tls
from server.protocol import ProtocolLimits, limited
from server.settings import Settings

logger = logging.getLogger("nv_embed")

_BACKLOG = 2048
_CLOSE_S = 5.0
"""How long open connections may take to finish their last answer once all is answered."""


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handling, which would re-raise the signal when it is done."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        raise AssertionError("signals are handled in server.lifecycle")


def run(settings: Settings, source: ModelSource) -> int:
    """Serve until a signal or a failure to start. Returns the exit status.

    Raises SettingsError or CheckpointError before anything listens.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(settings, source))


async def _serve(settings: Settings, source: ModelSource) -> int:
    engine = EmbeddingEngine(settings, source)
    listener, address = _listen(settings)
    server = _Uvicorn(_uvicorn_config(settings, engine))
    stop = _Signals()
    logger.info("listening on %s; the model is loading", address)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    engine.start()
    failing = asyncio.create_task(engine.failed())
    stopping = asyncio.create_task(stop.first.wait())
    try:
        await asyncio.wait({serving, failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            failing.result()
        if stop.first.is_set():
            await _drain(engine, stop, settings.drain_timeout)
        return 0
    except StartError as error:
        logger.error("cannot start: %s", error)
        return 1
    finally:
        stopping.cancel()
        failing.cancel()
        # First the engine, so that whoever still waits gets an answer before the connections end.
        await engine.stop()
        server.force_exit = stop.second.is_set()
        server.should_exit = True
        await serving
        if settings.uds:
            _unlink_socket(settings.uds)
        logger.info("stopped")


def _uvicorn_config(settings: Settings, engine: EmbeddingEngine) -> uvicorn.Config:
    """Raises SettingsError when the keys or the certificate cannot be used."""
    protocol = limited(_protocol_limits(settings), engine.metrics.count_refusal)
    tls = _tls_context(settings)
    config = uvicorn.Config(
        create_app(settings, engine),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks for the client's address
        http=with_tls(protocol, tls) if tls else protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=int(_CLOSE_S),
        backlog=_BACKLOG,
    )
    config.load()
    return config


def _tls_context(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except OSError as error:  # an SSLError is one
        raise SettingsError(f"--tls-certificate, --tls-key: {error}") from None
    return context


def _protocol_limits(settings: Settings) -> ProtocolLimits:
    return ProtocolLimits(
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        write_timeout=settings.write_timeout,
        max_connections=settings.max_connections,
    )


async def _drain(engine: EmbeddingEngine, stop: _Signals, timeout: float) -> None:  # noqa: ASYNC109
    logger.info("draining: new requests get a 503; again to stop at once")
    draining = asyncio.create_task(engine.drain(timeout))
    hurry = asyncio.create_task(stop.second.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurry):
        task.cancel()


class _Signals:
    """SIGINT and SIGTERM as two events."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._arrived)

    def _arrived(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _listen(settings: Settings) -> tuple[socket.socket, str]:
    """A socket that listens, and how to reach it. Raises SettingsError when it cannot."""
    if settings.uds:
        listener = socket.socket(socket.AF_UNIX)
        address = f"unix:{settings.uds}"
        target: str | tuple[str, int] = settings.uds
    else:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        target = (settings.host, settings.port)
    try:
        if settings.uds and not _is_served(settings.uds):
            _unlink_socket(settings.uds)
        listener.bind(target)
        listener.listen(_BACKLOG)  # now, for the log is about to say so
    except OSError as error:
        listener.close()
        where, option = f"{settings.host}:{settings.port}", "--host or --port"
        if settings.uds:
            where, option = settings.uds, "--uds"
        why = error.strerror or error  # too long a path has no number, so no strerror
        raise SettingsError(f"cannot listen on {where}: {why} ({option})") from None
    if not settings.uds:
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.tls_certificate else "http"
        address = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
    return listener, address


def _is_served(path: str) -> bool:
    """Whether somebody listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


def _unlink_socket(path: str) -> None:
    """Remove the socket file that an earlier server left; never another kind of file."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
