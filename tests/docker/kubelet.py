"""A kubelet's part in the life of a pod, played with a plain process: its probes, its preStop,
SIGTERM, and SIGKILL when the grace period is over. Knows no Kubernetes beyond the rendered pod.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.server.processes import ROOT, free_ports

Container = dict[str, Any]


class Pod:
    """One container, started; `url` is where its port is."""

    def __init__(self, pod: dict[str, Any], log: Path, **environment: str) -> None:
        """environment: in addition to the container's own, or in place of it."""
        (self._container,) = pod["spec"]["containers"]
        self._grace = pod["spec"]["terminationGracePeriodSeconds"]
        self.log, (port,) = log, free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        own = {one["name"]: one["value"] for one in self._container["env"] if "value" in one}
        given = {**os.environ, "PYTHONPATH": str(ROOT), **own, **environment}
        command = [sys.executable, "-m", "server.cli", *self._container["args"]]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env={**given, "NV_EMBED_PORT": f"{port}"}, stderr=file, cwd=log.parent
            )
        self.restarted = False
        """Whether the liveness probe would have done so."""
        self.ready = threading.Event()
        self._over = threading.Event()
        self._probing = threading.Thread(target=self._probe)
        self._probing.start()

    def _probe(self) -> None:
        """As the kubelet: the others begin when the startup probe has succeeded."""
        if self._wait_for("startupProbe"):
            others = [
                threading.Thread(target=self._repeat, args=(name,))
                for name in ("livenessProbe", "readinessProbe")
            ]
            for thread in others:
                thread.start()
            for thread in others:
                thread.join()

    def _wait_for(self, name: str) -> bool:
        probe = self._container[name]
        for _ in range(probe["failureThreshold"]):
            if self._succeeds(probe):
                return True
            if self._over.wait(probe["periodSeconds"]) or self.process.poll() is not None:
                return False
        self.restarted = True
        return False

    def _repeat(self, name: str) -> None:
        probe, failures = self._container[name], 0
        while not self._over.wait(probe["periodSeconds"]):
            failures = 0 if self._succeeds(probe) else failures + 1
            enough = failures >= probe["failureThreshold"]
            if name == "livenessProbe":
                self.restarted |= enough
            elif enough:
                self.ready.clear()
            elif not failures:
                self.ready.set()

    def _succeeds(self, probe: dict[str, Any]) -> bool:
        try:
            path, seconds = probe["httpGet"]["path"], probe["timeoutSeconds"]
            return httpx.get(f"{self.url}{path}", timeout=seconds).status_code < 400
        except httpx.HTTPError:
            return False

    @property
    def serves_on(self) -> float:
        """Seconds after it is told to end, in which requests that come are served."""
        stop = self._container.get("lifecycle", {}).get("preStop", {})
        seconds: float = stop.get("sleep", {}).get("seconds", 0)
        given = {one["name"]: one.get("value") for one in self._container["env"]}
        return seconds + float(given["NV_EMBED_DRAIN_DELAY"])

    def terminate(self) -> int | None:
        """-> the exit status; None when it had to be killed. The grace period holds for all."""
        deadline = time.monotonic() + self._grace
        stop = self._container.get("lifecycle", {}).get("preStop", {})
        time.sleep(stop.get("sleep", {}).get("seconds", 0))
        self.process.terminate()
        try:
            return self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None
        finally:
            self._over.set()
            self._probing.join()
