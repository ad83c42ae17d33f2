"""A real `nv-embed serve` on a real port, for tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import httpx

from tests.server.clients import PATIENCE_S, Asking

ROOT = Path(__file__).parents[2]


@cache
def usual_trust() -> ssl.SSLContext:
    """Of httpx itself, which reads the certificates anew for each client, in 20 ms."""
    return httpx.create_ssl_context()


class ServerProcess(Asking):
    """One server; `url` once it listens. Its log is a file, to be read while it runs."""

    def __init__(
        self,
        model: Path | None,
        *options: str,
        log: Path,
        env: dict[str, str] | None = None,
        verify: ssl.SSLContext | None = None,
        program: str = "server.cli",
        ids_of: str | None = "model",
    ) -> None:
        """ids_of: whose ids inputs are; None for an earlier server, which has no such option."""
        self.log_file = log
        command = [sys.executable, "-m", program, "serve"]
        command += ["--model", str(model)] if model else []
        command += ["--port", "0", "--dtype", "float32"]
        command += [] if "--devices" in options else ["--devices", "cpu"]
        command += ["--threads", "1"]  # the models are tiny, and the machine is shared
        if ids_of is not None and "--token-ids" not in options:
            command += ["--token-ids", ids_of]  # most tests know inputs by their ids
        # The tests' own runners are found through PYTHONPATH.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, *options], stderr=file, stdout=file, env=environment, cwd=log.parent
            )
        self.url = self._wait_for(r"listening on (https?://\S+);")
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=verify or usual_trust())

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.log):
                return match[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in the log (exit {self.process.poll()}):\n{self.log}")

    def says(self, text: str) -> bool:
        """Whether it is in the log, or comes: lines are written together, a moment later."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := text in self.log) is False and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def wait_ready(self) -> ServerProcess:
        self.wait_until(lambda: self.client.get("/readyz").status_code == 200, "ready")
        return self

    def worker_pids(self) -> list[int]:
        """Process ids of the engine workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Send a signal (unless it has ended) and return the exit status."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def run_cli(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )


def is_running(pid: int) -> bool:
    """Zombies do not run: a container's first process may not reap them."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has now, no two alike."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def listens(path: Path) -> bool:
    """Whether somebody listens on this Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def new_certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, made in `folder`."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 "
        f"-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -keyout {key} "
        f"-out {certificate}".split(),
        check=True,
        capture_output=True,
    )
    return certificate, key


@contextmanager
def serving(
    model: Path,
    *options: str,
    log: Path,
    env: dict[str, str] | None = None,
    program: str = "server.cli",
) -> Iterator[ServerProcess]:
    """A ready server, stopped at the end; it must have ended well, without a traceback."""
    server = ServerProcess(model, *options, log=log, env=env, program=program)
    try:
        yield server.wait_ready()
    except BaseException:
        server.process.kill()
        server.stop()
        raise
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log
