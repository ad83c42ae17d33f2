"""One server process from start to end: listen, start the workers, serve, drain, stop.

Owns the signals. The first SIGINT, SIGTERM or SIGHUP drains, a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import ssl
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from model.hub import ModelSource
from server.api.names import ServedNames
from server.engine.engine import EmbeddingEngine
from server.errors import SettingsError, StartError
from server.http.app import create_app
from server.http.connection import ProtocolLimits, limited
from server.http.file_limit import most_connections, raise_file_limit
from server.http.listener import BACKLOG, listen, unlink_socket
from server.http.tls import with_tls
from server.http.trace_target import export_to, target_of
from server.interpreter import prepare
from server.settings import Settings

if TYPE_CHECKING:
    from server.http.trace_export import TraceExport

logger = logging.getLogger("nv_embed")

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
    connections = _most_connections(settings, len(engine.worker_options))
    target = target_of(settings, os.environ)
    traces = export_to(target, settings) if target is not None else None
    server = _Uvicorn(_uvicorn_config(settings, engine, connections, traces))
    open_connections = server.server_state.connections
    engine.metrics.gauge(
        "nv_embed_open_connections", "Connections of clients", lambda: len(open_connections)
    )
    engine.metrics.constant("nv_embed_max_connections", "Connections, at most", connections)
    listener, address = listen(settings)
    stop = _Signals()
    prepare()
    logger.info("listening on %s; the model is loading", address)
    names = ServedNames(source.model_id, settings.served_model_name).names
    logger.info("clients name the model %s", ", ".join(names))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    engine.start()
    failing = asyncio.create_task(engine.failed())
    stopping = asyncio.create_task(stop.first.wait())
    try:
        await asyncio.wait({serving, failing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            failing.result()
        if stop.first.is_set():
            await _drain(engine, stop, settings)
        if stop.second.is_set() and engine.in_flight:
            logger.warning(
                "stopping at once: %d accepted requests get no answer but a 503", engine.in_flight
            )
            return 128 + stop.last
        return 0
    except StartError as error:
        logger.error("cannot start: %s", error)
        if engine.runners:  # others serve: what they have accepted is answered first
            await _drain(engine, stop, settings)
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
            unlink_socket(settings.uds)
        if traces is not None:
            traces.close()
        logger.info("stopped")


def _most_connections(settings: Settings, workers: int) -> int:
    """As many as were asked for, if the files suffice. Raises SettingsError for hardly any."""
    files, wanted = raise_file_limit(), settings.max_connections
    fit = most_connections(files, wanted, workers)
    if fit < wanted:
        logger.warning(
            "%d open files are allowed: at most %d connections, not %d (--max-connections); "
            "raise the hard limit (ulimit -Hn) for more",
            files,
            fit,
            wanted,
        )
    return fit


def _uvicorn_config(
    settings: Settings, engine: EmbeddingEngine, connections: int, traces: TraceExport | None
) -> uvicorn.Config:
    """Raises SettingsError when the keys or the certificate cannot be used."""
    protocol = limited(_protocol_limits(settings, connections), engine.metrics.count_refusal)
    tls = _tls_context(settings)
    config = uvicorn.Config(
        create_app(settings, engine, engine.metrics, traces),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody asks for the client's address
        http=with_tls(protocol, tls) if tls else protocol,  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=int(_CLOSE_S),
        backlog=BACKLOG,
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


def _protocol_limits(settings: Settings, connections: int) -> ProtocolLimits:
    return ProtocolLimits(
        header_timeout=settings.header_timeout,
        body_timeout=settings.body_timeout,
        write_timeout=settings.write_timeout,
        max_connections=connections,
        max_connection_age=settings.max_connection_age,
    )


async def _drain(engine: EmbeddingEngine, stop: _Signals, settings: Settings) -> None:
    """Leave the load balancer, serving on; then finish what was accepted."""
    draining = asyncio.create_task(_leave(engine, settings))
    hurry = asyncio.create_task(stop.second.wait())
    await asyncio.wait({draining, hurry}, return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurry):
        task.cancel()


async def _leave(engine: EmbeddingEngine, settings: Settings) -> None:
    delay = settings.drain_delay if engine.runners else 0.0  # without a worker nothing is served
    engine.leave()
    if delay:
        logger.info(
            "leaving: not ready any more, but serving for %.0f s; again to stop at once", delay
        )
        await asyncio.sleep(delay)
    logger.info("draining: new requests get a 503; again to stop at once")
    await engine.drain(settings.drain_timeout)


class _Signals:
    """The signals that stop, as two events."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.last = 0
        """The number of the signal that came last."""
        loop = asyncio.get_running_loop()
        signums = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            signums.append(signal.SIGHUP)
        for signum in signums:
            loop.add_signal_handler(signum, self._arrived, signum)

    def _arrived(self, signum: int) -> None:
        self.last = signum
        (self.second if self.first.is_set() else self.first).set()
