"""A client that leaves ends its work, whichever ASGI server tells of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from server.api.request_context import disconnect_extension
from server.engine.metrics import Metrics
from server.http.app import create_app
from server.settings import Settings
from tests.server.fakes import FakeEngine, logged
from tests.server.processes import ROOT

BODY = json.dumps({"model": "golden-embed", "input": ["a", "b"]}).encode()
LARGE = json.dumps({"model": "golden-embed", "input": ["a"], "user": "u" * 2_000_000}).encode()


class Client:
    """One request by ASGI's messages alone; its server is not ours unless it says `gone`."""

    def __init__(self, path: str, body: bytes, gone: asyncio.Future[None] | None = None) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        if gone is not None:
            self.scope["extensions"] = disconnect_extension(gone)
        self._bodies = [body[:10], body[10:]]
        self.left = asyncio.Event()
        self.asked = 0
        """How often `receive` was called after the body."""
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self._bodies:
            body = self._bodies.pop(0)
            return {"type": "http.request", "body": body, "more_body": bool(self._bodies)}
        self.asked += 1
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None


Test = Callable[[FastAPI, FakeEngine], Awaitable[None]]


def run(model: Path, test: Test) -> str:
    """Run it with an app whose engine holds what comes; returns the log. No task may be left."""

    async def main() -> None:
        settings = Settings()
        engine = FakeEngine(model, settings)
        engine.open.clear()
        await asyncio.wait_for(test(create_app(settings, engine, Metrics()), engine), 30)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with logged() as log:
        asyncio.run(main())
    assert "Traceback" not in log.getvalue(), log.getvalue()
    return log.getvalue()


async def until(predicate: Callable[[], bool]) -> None:
    while not predicate():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize("body", [BODY, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("is_ours", [False, True], ids=["by its message", "by our future"])
def test_the_engines_work_is_cancelled(
    golden_checkpoint: Path, path: str, body: bytes, is_ours: bool
) -> None:
    async def test(app: FastAPI, engine: FakeEngine) -> None:
        gone = asyncio.get_running_loop().create_future() if is_ours else None
        client = Client(path, body, gone)
        request = asyncio.create_task(app(client.scope, client.receive, client.send))
        await until(lambda: len(engine.jobs) == 1)
        await asyncio.sleep(0.01)
        assert engine.cancelled == 0
        assert not request.done()
        client.left.set()
        if gone is not None:
            gone.set_result(None)
        await request  # it ends by itself, and without an error for the server to log
        assert engine.cancelled == 1
        assert client.status in (None, 499)
        assert (client.asked == 0) == is_ours, "a future makes the task that listens unnecessary"

    assert f"POST {path} 499" in run(golden_checkpoint, test)


def test_a_client_that_stays_is_answered(golden_checkpoint: Path) -> None:
    """What listened for its leaving is gone with the request."""

    async def test(app: FastAPI, engine: FakeEngine) -> None:
        client = Client("/v1/embeddings", BODY)
        request = asyncio.create_task(app(client.scope, client.receive, client.send))
        await until(lambda: client.asked > 0)
        engine.open.set()
        await request
        assert (client.status, engine.cancelled) == (200, 0)
        answer = json.loads(b"".join(m.get("body", b"") for m in client.sent[1:]))
        assert len(answer["data"]) == 2

    run(golden_checkpoint, test)


def test_a_server_that_cancels_is_not_taken_for_a_client_that_left(golden_checkpoint: Path) -> None:
    """As uvicorn does when it stops: the cancellation goes through to whoever asked for it."""

    async def test(app: FastAPI, engine: FakeEngine) -> None:
        client = Client("/v1/embeddings", BODY)
        request = asyncio.create_task(app(client.scope, client.receive, client.send))
        await until(lambda: len(engine.jobs) == 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert engine.cancelled == 1

    run(golden_checkpoint, test)


def test_the_others_go_on(golden_checkpoint: Path) -> None:
    async def test(app: FastAPI, engine: FakeEngine) -> None:
        clients = [Client("/v1/embeddings", BODY) for _ in range(20)]
        requests = [
            asyncio.create_task(app(client.scope, client.receive, client.send))
            for client in clients
        ]
        await until(lambda: len(engine.jobs) == 20)
        for client in clients[::2]:
            client.left.set()
        await until(lambda: engine.cancelled == 10)
        engine.open.set()
        await asyncio.gather(*requests)
        assert [client.status for client in clients[1::2]] == [200] * 10

    run(golden_checkpoint, test)


# uvicorn as anyone starts it, with its own protocol


PROGRAM = """
import asyncio, sys
from pathlib import Path
import uvicorn
from server.engine.metrics import Metrics
from server.http.app import create_app
from server.settings import Settings
from tests.server.fakes import FakeEngine

settings = Settings()
engine = FakeEngine(Path(sys.argv[1]), settings)
engine.open.clear()

async def main():
    app = create_app(settings, engine, Metrics())
    server = uvicorn.Server(uvicorn.Config(app, fd=int(sys.argv[2]), http=sys.argv[3]))
    serving = asyncio.create_task(server.serve())
    while not engine.jobs:
        await asyncio.sleep(0.01)
    print("held", flush=True)
    while not engine.cancelled:
        await asyncio.sleep(0.01)
    print("cancelled", flush=True)
    server.should_exit = True
    await serving

asyncio.run(main())
"""


@pytest.mark.process
@pytest.mark.parametrize("http", ["httptools", "h11"])
def test_under_plain_uvicorn(golden_checkpoint: Path, tmp_path: Path, http: str) -> None:
    log = tmp_path / "log"
    with log.open("wb") as errors, socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(golden_checkpoint), str(listener.fileno()), http],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            pass_fds=[listener.fileno()],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n"
            with socket.create_connection(listener.getsockname()[:2]) as client:
                client.sendall(head.encode() + BODY)
                assert process.stdout is not None
                assert process.stdout.readline() == "held\n", log.read_text()
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait()
    assert (rest, process.returncode) == ("cancelled\n", 0), log.read_text()
    assert "Traceback" not in log.read_text()
