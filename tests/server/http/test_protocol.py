"""Raw bytes at a real socket: floods, slow senders, slow readers, garbage."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.server.processes import ServerProcess, new_certificate, serving

pytestmark = pytest.mark.process

FAKE = ("--runner", "tests.server.runners:Hashing")
POST = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    options = ("--header-timeout", "1", "--body-timeout", "1", "--write-timeout", "1")
    options += ("--max-body-bytes", "1000000")
    log = tmp_path_factory.mktemp("protocol") / "log"
    with serving(golden_checkpoint, *FAKE, *options, log=log) as server:
        yield server
        assert server.embed(input="still here").status_code == 200


@contextmanager
def connected(server: ServerProcess) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    parts = []
    while part := client.recv(65536):
        parts.append(part)
    return b"".join(parts)


def answer_of(raw: bytes) -> tuple[int, dict[str, str], dict]:
    """Status, headers and error of one whole answer."""
    head, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert headers["connection"] == "close"
    assert headers["x-request-id"]
    return int(status.split()[1]), headers, json.loads(body)["error"]


@pytest.mark.parametrize(
    "flood",
    [
        b"".join(b"x-%d: y\r\n" % index for index in range(200)),
        b"x-large: " + b"y" * 100_000 + b"\r\n",
        b"x-endless: " + b"y" * 200_000,  # never a line's end
    ],
    ids=["many", "large", "endless"],
)
def test_header_floods_get_a_431(server: ServerProcess, flood: bytes) -> None:
    with connected(server) as client:
        client.sendall(POST + flood)
        status, _, error = answer_of(read_all(client))
    assert (status, error["code"]) == (431, "headers_too_large")


def test_a_url_flood_gets_a_431(server: ServerProcess) -> None:
    with connected(server) as client:
        client.sendall(b"GET /" + b"a" * 200_000)
        assert answer_of(read_all(client))[0] == 431


def test_a_head_that_never_ends_gets_a_408(server: ServerProcess) -> None:
    with connected(server) as client:
        client.sendall(POST)
        status, _, error = answer_of(read_all(client))
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_body_that_never_ends_gets_a_408(server: ServerProcess) -> None:
    with connected(server) as client:
        client.sendall(POST + b"content-length: 100\r\n\r\n{")
        assert answer_of(read_all(client))[0] == 408
    server.wait_until(lambda: "POST /v1/embeddings 499" in server.log, "given up by the route")


def test_a_silent_connection_is_closed(server: ServerProcess) -> None:
    with connected(server) as client:
        assert read_all(client) == b""


def test_half_a_request_does_not_disturb_others(server: ServerProcess) -> None:
    with connected(server) as half:
        half.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        fields = {"model": "golden-embed", "input": "x"}
        assert server.client.post("/v1/embeddings", json=fields).status_code == 200


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"\0" * 99])
def test_garbage_gets_a_400_in_the_envelope(server: ServerProcess, garbage: bytes) -> None:
    with connected(server) as client:
        client.sendall(garbage)
        status, _, error = answer_of(read_all(client))
    assert status == 400
    assert "not an HTTP/1.1 request" in error["message"]


def test_a_client_that_does_not_read_is_cut_off(server: ServerProcess) -> None:
    body = json.dumps({"model": "golden-embed", "input": ["x"] * 2048}).encode()
    request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    with connected(server) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(20):  # several megabytes of answers, of which none is read
            client.sendall(request)
        deadline = time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                time.sleep(0.05)
                client.sendall(b"G")
            raise AssertionError("the connection is still open")


def test_a_body_that_is_too_large_is_read_to_its_end(server: ServerProcess) -> None:
    """So that a client that sends before it reads sees the 413, not a broken connection."""
    body = b" " * 3_000_000
    with connected(server) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
        status, _, error = answer_of(read_all(client))
    assert (status, error["code"]) == (413, "body_too_large")


def test_connections_beyond_the_cap_get_a_503(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*FAKE, "--max-connections", "3")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        with connected(server), connected(server), connected(server) as last:
            status, headers, _ = answer_of(read_all(last))
            assert status == 503
            assert headers["retry-after"] == "1"
        server.wait_until(lambda: server.embed(input="x").status_code == 200, "served again")
        text = server.client.get("/metrics").text
        assert 'nv_embed_requests_total{route="other",status="503"} 1.0' in text


def test_a_client_that_goes_after_a_large_body_is_noticed(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """A piece above uvicorn's high-water mark stops the reading. When it was the last one, nobody
    asks for more, and the end of the connection must be seen all the same."""
    options = (*FAKE, "--max-batch-tokens", "64")
    batches = tmp_path / "batches"
    env = {"FAKE_SECONDS": "0.3", "FAKE_BATCH_LOG": str(batches)}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        for kilobytes in range(70, 250, 30):
            inputs = [f"{number} " + "word " * 200 for number in range(kilobytes)]
            body = json.dumps({"model": "golden-embed", "input": inputs}).encode()
            with connected(server) as client:
                client.sendall(POST + b"content-length: %d\r\n\r\n" % len(body))
                time.sleep(0.05)  # the app waits for the body, which then comes in few pieces
                client.sendall(body)
                server.wait_for_metric("nv_embed_running_requests", 1)
            server.wait_for_metric("nv_embed_queued_tokens", 0)
            server.wait_for_metric("nv_embed_running_requests", 0)
            ran = batches.read_text().splitlines()
            batches.write_text("")
            assert len(ran) < len(inputs) // 2, "it was worked through, each input in a batch"


def test_a_key_in_a_trailer_opens_nothing(golden_checkpoint: Path, tmp_path: Path) -> None:
    body = b'{"model":"golden-embed","input":"x"}'
    chunks = b"%x\r\n%s\r\n0\r\nauthorization: Bearer secret\r\n\r\n" % (len(body), body)
    with serving(golden_checkpoint, *FAKE, "--api-key", "secret", log=tmp_path / "log") as server:
        for given in (b"", b"authorization: Bearer wrong\r\n"):
            with connected(server) as client:
                lines = given + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
                client.sendall(POST + lines + chunks)
                assert read_all(client).startswith(b"HTTP/1.1 401 ")
        key = {"authorization": "Bearer secret"}
        server.client.headers.update(key)
        assert server.embed(input="x").status_code == 200


def test_tls(golden_checkpoint: Path, tmp_path: Path) -> None:
    certificate, key = new_certificate(tmp_path)
    options = (*FAKE, "--tls-certificate", str(certificate), "--tls-key", str(key))
    trusted = ssl.create_default_context(cafile=str(certificate))
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log", verify=trusted)
    try:
        assert server.url.startswith("https://")
        server.wait_ready()
        assert server.embed(input="x").status_code == 200
    finally:
        assert server.stop() == 0
