"""More than anyone should send, at a real socket, and how long others wait for it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import ssl
import time
from pathlib import Path

import httpx
import pytest

from tests.chaos.load import rss_bytes
from tests.server.http.test_protocol import FAKE, connected
from tests.server.processes import ServerProcess, new_certificate, serving

pytestmark = pytest.mark.timing

LONG = "a sentence of some words, " * 30  # more than is tokenized on the event loop


def test_a_pipeline_without_end_costs_little_memory(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Megabytes of small requests on one connection whose answers nobody reads."""
    flood = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n" * 10_000
    with serving(golden_checkpoint, *FAKE, log=tmp_path / "log") as server:
        before = rss_bytes(server.process.pid)
        with connected(server) as client:
            client.settimeout(1)
            sent, slowest = 0, 0.0
            with contextlib.suppress(TimeoutError):
                while sent < 60_000_000:
                    sent += client.send(flood)
                    started = time.monotonic()
                    assert server.client.get("/livez").status_code == 200
                    slowest = max(slowest, time.monotonic() - started)
            assert sent < 60_000_000, "it is read without an end"
            assert slowest < 1
            assert rss_bytes(server.process.pid) - before < 20_000_000


def test_tls_connections_count_from_their_accept(golden_checkpoint: Path, tmp_path: Path) -> None:
    """A handshake that nobody begins keeps a place, and only until the time limit of heads."""
    certificate, key = new_certificate(tmp_path)
    options = (*FAKE, "--tls-certificate", str(certificate), "--tls-key", str(key))
    options += ("--max-connections", "20", "--header-timeout", "2")
    trusted = ssl.create_default_context(cafile=str(certificate))
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log", verify=trusted)
    try:
        server.wait_ready()
        server.client.close()
        files = Path(f"/proc/{server.process.pid}/fd")
        host, port = server.url.removeprefix("https://").split(":")

        def closed_at_once(count: int, start: bytes = b"") -> int:
            """Open so many connections that send `start`; how many are cut off soon."""
            for _ in range(count):
                silent.append(stack.enter_context(socket.create_connection((host, int(port)))))
                silent[-1].sendall(start)
            time.sleep(0.5)
            ready = select.select(silent, [], [], 0)[0]
            return len(ready)

        with contextlib.ExitStack() as stack:
            silent: list[socket.socket] = []
            quiet = len(list(files.iterdir()))
            started = time.monotonic()
            assert closed_at_once(100) == 80
            assert len(list(files.iterdir())) <= quiet + 20
            for client in silent:
                client.settimeout(10)
                with contextlib.suppress(ConnectionError):
                    assert client.recv(1) == b""
            assert time.monotonic() - started < 6
            # Half a handshake, and what is none: their places are free again, too.
            silent.clear()
            closed_at_once(15, b"\x16\x03\x01\x02\x00\x01")
            closed_at_once(5, b"GET / HTTP/1.1\r\n\r\n")
            fresh = httpx.Client(base_url=server.url, verify=trusted)
            with fresh:
                server.wait_until(lambda: _answers(fresh), "served again")
                body = {"model": "golden-embed", "input": ["x" * 300] * 200}
                assert fresh.post("/v1/embeddings", json=body).status_code == 200
        server.wait_until(lambda: len(list(files.iterdir())) <= quiet, "all files are closed")
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.log


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("path", ["/tokenize", "/v1/embeddings"])
def test_clients_that_left_do_not_hold_up_others(hashing_server: ServerProcess, path: str) -> None:
    """Each would be a second of work; what is not begun is dropped, what is begun ends early."""
    body = json.dumps(
        {"model": "golden-embed", "input": ["many words " * 180] * 2048, "truncate": "END"}
    )
    server = hashing_server
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    raw = f"{head}content-length: {len(body)}\r\n\r\n{body}".encode()
    assert len(body) > 4_000_000
    for _ in range(6):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(raw)
    begin = time.monotonic()
    server.wait_for_metric("nv_embed_inflight_bytes", 0)
    assert server.client.post("/tokenize", json={"input": LONG}).status_code == 200
    assert time.monotonic() - begin < 5, "six such requests take longer"
