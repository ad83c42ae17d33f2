"""A real Prometheus with the project's own configuration, looking more often, at one server."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import yaml

from tests.docker import dashboards
from tests.server.processes import free_ports

PATIENCE_S = 60.0


@contextlib.contextmanager
def watching(
    folder: Path, target: str, rules: Path = dashboards.MONITORING / "alerts.yml"
) -> Iterator[httpx.Client]:
    """target: a server's URL."""
    config = yaml.safe_load((dashboards.MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(rules)]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}") as client:
            _wait_for(client)
            yield client
    finally:
        process.terminate()
        process.wait()


def firing(client: httpx.Client) -> set[str]:
    """Names of the alerts that fire now."""
    alerts = client.get("/api/v1/alerts").json()["data"]["alerts"]
    return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


def _wait_for(client: httpx.Client) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/-/ready").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("Prometheus does not answer")
