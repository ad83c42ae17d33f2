"""Each alert by the real fault that it is for: it fires, and is over when the fault is.

The rules are the project's, with seconds for their minutes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from tests.docker import dashboards, prometheus
from tests.server.processes import ServerProcess, free_ports
from tests.server.questions import RUNNERS, marked_ids

PATIENCE_S = 90.0
Fault = Callable[["Stage"], contextlib.AbstractContextManager[object]]


class Stage:
    """A server at an address that Prometheus knows, and what can be done to it."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self._checkpoint = folder, checkpoint
        (self.port,) = free_ports(1)
        self.server: ServerProcess | None = None

    def start(self, runner: str, *options: str, **env: str) -> ServerProcess:
        given = ("--runner", f"{RUNNERS}{runner}", "--no-access-log", "--port", f"{self.port}")
        log = self.folder / "alert-log"
        server = ServerProcess(self._checkpoint, *given, *options, log=log, env=env)
        self.server = server.wait_ready()
        return self.server

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop()
            self.server = None

    @contextlib.contextmanager
    def asking(self, *bodies: dict[str, object], clients: int = 1) -> Iterator[None]:
        """Clients that send these bodies again and again until the block ends."""
        over = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60) as client:
                while not over.is_set():
                    for body in bodies:
                        with contextlib.suppress(httpx.HTTPError):
                            client.post("/v1/embeddings", json=body)
                    over.wait(0.05)

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


# Each starts a server, and is a fault of it while the inner block lasts


@contextlib.contextmanager
def gone(stage: Stage) -> Iterator[None]:
    stage.start("Hashing")
    stage.stop()
    yield
    stage.start("Hashing")


@contextlib.contextmanager
def without_a_device(stage: Stage) -> Iterator[None]:
    lost = stage.folder / "lost"
    server = stage.start("LosesItsDevice", "--devices", "cpu,cpu", FAKE_DEVICE_LOST=str(lost))
    server.wait_for_metric("nv_embed_workers_ready", 2)
    lost.touch()
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    yield
    lost.unlink()


@contextlib.contextmanager
def failing(stage: Stage) -> Iterator[None]:
    stage.start("Failing")
    with stage.asking({"input": "x"}, {"input": [marked_ids()]}):
        yield


@contextlib.contextmanager
def full(stage: Stage) -> Iterator[None]:
    held = stage.folder / "held"
    held.touch()
    stage.start("Held", "--max-queued-tokens", "300000", FAKE_HELD=str(held))
    held.touch()
    bulk: dict[str, object] = {"input": [f"{n} " + "word " * 1000 for n in range(250)]}
    with stage.asking(bulk, clients=4):
        yield
        held.unlink()


@contextlib.contextmanager
def slow(stage: Stage) -> Iterator[None]:
    stage.start("Hashing", "--max-batch-seqs", "1", FAKE_SECONDS="0.4")
    bodies: list[dict[str, object]] = [{"input": [f"text {n}" for n in range(16)]}]
    with stage.asking(*bodies):
        yield


@contextlib.contextmanager
def dying(stage: Stage) -> Iterator[None]:
    server = stage.start("Hashing")
    time.sleep(3)  # Prometheus has seen that none had died
    for deaths in range(1, 4):
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_for_metric("nv_embed_worker_deaths_total", deaths)
        server.wait_for_metric("nv_embed_workers_ready", 1)
    yield


FAULTS: dict[str, Fault] = {
    "NvEmbedDown": gone,
    "NvEmbedWorkersMissing": without_a_device,
    "NvEmbedErrors": failing,
    "NvEmbedRefusing": full,
    "NvEmbedSlow": slow,
    "NvEmbedWorkersDying": dying,
}


def problems(folder: Path, checkpoint: Path) -> Iterator[str]:
    """Of all alerts, one after the other."""
    text = (dashboards.MONITORING / "alerts.yml").read_text()
    quick, changed = re.subn(r"\bfor: \d+m\b", "for: 2s", text)
    assert changed == 5, "one has no patience"
    quick = quick.replace("[5m]", "[8s]").replace("[15m]", "[20s]")
    (folder / "alerts.yml").write_text(quick)
    stage = Stage(folder, checkpoint)
    if set(FAULTS) != {rule["alert"] for rule in dashboards.alerts()}:
        yield "not every alert has its fault"
    with prometheus.watching(
        folder, f"http://127.0.0.1:{stage.port}", folder / "alerts.yml"
    ) as client:
        for alert, fault in FAULTS.items():
            try:
                with fault(stage):
                    fires = _within_patience(lambda: alert in prometheus.firing(client))  # noqa: B023
                ends = _within_patience(lambda: alert not in prometheus.firing(client))  # noqa: B023
            finally:
                stage.stop()
            print(f"{alert}: fires {fires}, ends {ends}")
            if not (fires and ends):
                yield f"{alert}: its fault fires it: {fires}; it ends with it: {ends}"


def _within_patience(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
