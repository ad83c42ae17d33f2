"""The server as its system finds it: streams closed or unread, few files, signals."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.errors import SettingsError
from server.http.file_limit import most_connections
from tests.server.processes import ROOT, ServerProcess, listens
from tests.server.questions import RUNNERS
from tests.server.runners import MARK

pytestmark = pytest.mark.process

HASHING = ("--runner", RUNNERS + "Hashing")


@contextmanager
def started(
    model: Path,
    folder: Path,
    *options: str,
    before: str = "",
    redirect: str = "",
    stderr: int | None = None,
) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A ready server on a Unix socket, started from a shell: `before` comes before it, `redirect`
    changes its streams."""
    path = folder / "socket"
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(model)]
    command += ["--uds", str(path), "--devices", "cpu", "--threads", "1", *options]
    process = subprocess.Popen(
        ["sh", "-c", f'{before}\nexec "$@" {redirect}', "sh", *command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=stderr,
    )
    transport = httpx.HTTPTransport(uds=str(path))
    try:
        with httpx.Client(transport=transport, base_url="http://x", timeout=20) as client:
            deadline = time.monotonic() + 40
            while not _is_ready(client, path):
                assert process.poll() is None, process.returncode
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process, client
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def _is_ready(client: httpx.Client, path: Path) -> bool:
    return listens(path) and client.get("/readyz").status_code == 200


def embed(client: httpx.Client, what: object = "x") -> int:
    body = {"model": "golden-embed", "input": what, "token_ids": "model"}
    return client.post("/v1/embeddings", json=body).status_code


def end(process: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> int:
    process.send_signal(signum)
    return process.wait(10)


# Streams


@pytest.mark.parametrize("redirect", ["2>&-", "0<&- 1>&- 2>&-", "2>/dev/full 1>/dev/full"])
def test_streams_that_are_closed_or_full(
    golden_checkpoint: Path, tmp_path: Path, redirect: str
) -> None:
    with started(golden_checkpoint, tmp_path, *HASHING, redirect=redirect) as (process, client):
        for fd in range(3):
            target = os.readlink(f"/proc/{process.pid}/fd/{fd}")
            assert "anon_inode" not in target
            assert "socket" not in target
        assert embed(client) == 200
        assert end(process) == 0


@pytest.mark.parametrize("command", [("--version",), ("serve", "--no-such-option"), ("openapi",)])
def test_other_commands_without_streams(command: tuple[str, ...]) -> None:
    closed = subprocess.run(
        [
            "sh",
            "-c",
            'exec "$@" 0<&- 1>&- 2>&-',
            "sh",
            sys.executable,
            "-m",
            "server.cli",
            *command,
        ],
        cwd=ROOT,
        timeout=30,
    )
    assert closed.returncode == (2 if command[0] == "serve" else 0)


def test_a_log_that_nobody_reads_stops_nothing(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Neither the front nor a worker, which writes a failed batch's traceback."""
    options = ("--runner", RUNNERS + "Failing")
    with started(golden_checkpoint, tmp_path, *options, stderr=subprocess.PIPE) as (
        process,
        client,
    ):
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        for number in range(60):
            assert embed(client, f"text {number}") == 200
        for _ in range(10):
            assert embed(client, [[1, MARK, 2]]) == 500
        assert embed(client) == 200
        assert client.get("/livez").status_code == 200
        assert end(process) == 0


# Files


def test_few_files_limit_the_connections_and_not_the_workers(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Beyond what fits a 503, and a worker that dies is replaced all the same."""
    with (
        (tmp_path / "log").open("wb") as log,
        started(
            golden_checkpoint, tmp_path, *HASHING, before="ulimit -n 256", stderr=log.fileno()
        ) as (process, client),
    ):
        said = (tmp_path / "log").read_text()
        fit = most_connections(256, 4096, workers=1)
        assert f"256 open files are allowed: at most {fit} connections" in said
        held = [_connect(tmp_path / "socket") for _ in range(fit - 1)]  # and the client's own
        time.sleep(0.3)
        with _connect(tmp_path / "socket") as late:
            assert late.recv(100).startswith(b"HTTP/1.1 503 ")
        flood = [_connect(tmp_path / "socket") for _ in range(40)]
        (worker,) = _children(process.pid)
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while embed(client) != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert _children(process.pid) != [worker]
        for connection in held + flood:
            connection.close()
        assert end(process) == 0
    assert "cannot be started" not in (tmp_path / "log").read_text()


def _connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    ("files", "wanted", "workers", "expected"),
    [
        (1 << 20, 4096, 1, 4096),
        (sys.maxsize, 4096, 8, 4096),
        (1024, 4096, 1, 840),
        (1024, 4096, 8, 784),
        (1024, 100, 1, 100),
        (100, 4, 1, 4),
    ],
)
def test_connections_within_the_files(files: int, wanted: int, workers: int, expected: int) -> None:
    assert most_connections(files, wanted, workers) == expected


@pytest.mark.parametrize("files", [3, 20, 64])
def test_too_few_files_to_serve_stop_the_start(files: int) -> None:
    with pytest.raises(SettingsError, match=f"only {files} open files.*raise the limit to 1"):
        most_connections(files, 4096, workers=1)


def test_a_start_with_too_few_files_says_so(golden_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(golden_checkpoint)]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -n 50; exec "$@"', "sh", *command, "--port", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "only 50 open files are allowed" in result.stderr


# Memory


def test_out_of_address_space_is_one_line(golden_checkpoint: Path, tmp_path: Path) -> None:
    """torch cannot be loaded."""
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(golden_checkpoint)]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -v 400000; exec "$@"', "sh", *command, "--port", "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if "INFO" not in line]
    assert len(errors) == 1, result.stderr
    assert "cpu has too little memory to load and run the model" in errors[0]


# Signals


@pytest.mark.usefixtures("signals_as_usual")
def test_a_closing_terminal_drains(golden_checkpoint: Path, tmp_path: Path) -> None:
    """SIGHUP to the whole group: the worker must finish what it has."""
    with _at_work(golden_checkpoint, tmp_path, seconds=1) as (server, statuses):
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGHUP)
        assert end(server.process, signal.SIGHUP) == 0
        statuses.join()
    assert statuses.got == [200]
    assert "draining" in server.log


def test_nohup_is_obeyed_and_the_file_limit_raised(golden_checkpoint: Path, tmp_path: Path) -> None:
    before = "trap '' HUP; ulimit -Sn 100"
    with started(golden_checkpoint, tmp_path, *HASHING, before=before) as (process, client):
        soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > 100, "as many files as may be"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert embed(client) == 200
        assert end(process) == 0


@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_says_what_it_drops(
    golden_checkpoint: Path, tmp_path: Path, signum: int
) -> None:
    with _at_work(golden_checkpoint, tmp_path, seconds=20) as (server, statuses):
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: "draining" in server.log, "draining")
        assert end(server.process, signum) == 128 + signum
        statuses.join()
    assert statuses.got == [503]
    assert "stopping at once: 1 accepted requests get no answer but a 503" in server.log


def test_ctrl_c_is_not_told_to_the_workers(golden_server: ServerProcess) -> None:
    """A terminal sends it to the whole process group, also while a worker imports its modules."""
    (worker,) = golden_server.worker_pids()
    assert os.getpgid(worker) != os.getpgid(golden_server.process.pid)


class _Asking(threading.Thread):
    def __init__(self, server: ServerProcess) -> None:
        super().__init__()
        self._server = server
        self.got: list[int] = []

    def run(self) -> None:
        self.got.append(self._server.embed(input="x").status_code)


@contextmanager
def _at_work(model: Path, folder: Path, seconds: float) -> Iterator[tuple[ServerProcess, _Asking]]:
    """A server with one request in a worker's hands for so long."""
    env = {"FAKE_SECONDS": str(seconds)}
    server = ServerProcess(model, *HASHING, log=folder / "log", env=env).wait_ready()
    asking = _Asking(server)
    try:
        asking.start()
        server.wait_for_metric("nv_embed_running_requests", 1)
        yield server, asking
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()
        asking.join()
        server.client.close()
    assert "Traceback" not in server.log
