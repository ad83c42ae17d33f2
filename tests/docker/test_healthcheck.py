"""The image's health check against servers that are ready, not ready, absent and stuck."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "healthcheck.py"


@pytest.fixture
def healthcheck(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TIMEOUT_S", 0.3)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # must not be asked
    return module


@contextlib.contextmanager
def answering(status: int) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/readyz"
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1), (404, 1)])
def test_the_servers_status_decides(
    healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch, status: int, expected: int
) -> None:
    with answering(status) as port:
        monkeypatch.setenv("NV_EMBED_PORT", str(port))
        assert healthcheck.main() == expected


def test_an_address_from_kubernetes_is_no_port(
    healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NV_EMBED_PORT", "tcp://10.0.0.1:9")
    healthcheck.main()
    said = capsys.readouterr().out
    assert "127.0.0.1:8000" in said or said.startswith(("200", "503"))


def test_a_server_that_accepts_and_says_nothing_is_unhealthy_in_bounded_time(
    healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stuck:
        monkeypatch.setenv("NV_EMBED_PORT", str(stuck.getsockname()[1]))
        assert healthcheck.main() == 1
    assert "does not answer: TimeoutError" in capsys.readouterr().out


def test_a_closed_port_is_unhealthy(
    healthcheck: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setenv("NV_EMBED_PORT", str(port))
    assert healthcheck.main() == 1
