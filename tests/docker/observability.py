"""`make observability-check`: Prometheus' own judgement of config, rules and their tests, and each
query of each panel against a real Prometheus that scrapes a real server under load.

Ends with status 1 where anything is wrong or a program is missing.
"""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.checkpoints import write_checkpoint
from tests.docker import dashboards
from tests.server.processes import ServerProcess
from tests.server.questions import RUNNERS, WORDS

INTERVAL = "12s"
"""For Grafana's $__rate_interval: four scrapes and more."""
PATIENCE_S = 60.0


def main() -> int:
    missing = [tool for tool in ("prometheus", "promtool") if shutil.which(tool) is None]
    if missing:
        print(f"missing: {', '.join(missing)}; Debian: apt-get install prometheus")
        return 1
    for command in ("check config prometheus.yml", "check rules alerts.yml"):
        _promtool(*command.split())
    _promtool("test", "rules", "alerts_test.yml")
    if found := dashboards.problems(dashboards.dashboard()):
        print("\n".join(found))
        return 1
    with tempfile.TemporaryDirectory() as folder:
        return _queries_give_numbers(Path(folder))


def _promtool(*arguments: str) -> None:
    subprocess.run(["promtool", *arguments], cwd=dashboards.MONITORING, check=True)


def _queries_give_numbers(folder: Path) -> int:
    checkpoint = write_checkpoint(folder / "golden")
    options = ("--runner", f"{RUNNERS}Hashing", "--no-access-log", "--cache-bytes", "100000000")
    server = ServerProcess(checkpoint, *options, log=folder / "log").wait_ready()
    stop = threading.Event()
    load = threading.Thread(target=_load, args=(server.url, stop))
    load.start()
    try:
        with _prometheus(folder, server.url) as url, httpx.Client(base_url=url) as client:
            wrong = _until_right(client)
            rules = client.get("/api/v1/rules").json()["data"]["groups"]
    finally:
        stop.set()
        load.join()
        server.stop()
    all_rules = [rule for group in rules for rule in group["rules"]]
    for rule in all_rules:
        print(f"{rule['name']}: {rule['health']}, {rule['state']}")
        if (rule["health"], rule["state"]) != ("ok", "inactive"):
            wrong.append(f"the alert {rule['name']} is {rule['health']}, {rule['state']}")
    if len(all_rules) != len(dashboards.alerts()):
        wrong.append("not all alerts were loaded")
    print("\n".join(wrong) or "every query of every panel gives finite numbers")
    return 1 if wrong else 0


def _load(url: str, stop: threading.Event) -> None:
    """Requests of many sizes, some of them known already, some refused."""
    dice = random.Random(18)
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            texts = [" ".join(dice.choices(WORDS, k=dice.randint(1, 300))) for _ in range(8)]
            for body in ({"input": texts}, {"input": texts[:2]}, {"input": []}):
                client.post("/v1/embeddings", json=body)
            time.sleep(0.02)


@contextlib.contextmanager
def _prometheus(folder: Path, target: str) -> Iterator[str]:
    """The project's own configuration, looking more often, at this server alone."""
    config = yaml.safe_load((dashboards.MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(dashboards.MONITORING / "alerts.yml")]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_for(f"http://{address}/-/ready")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"{url} does not answer")


def _until_right(client: httpx.Client) -> list[str]:
    """What is wrong with the queries, once nothing is or the patience is over."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        seen = [(query, _values(client, query)) for query in dashboards.queries()]
        wrong = [
            f"{query.panel}, {query.legend}: {values or 'no series'}"
            for query, values in seen
            if not values or not all(map(math.isfinite, values))
        ]
        if not wrong or time.monotonic() > deadline:
            for query, values in seen:
                print(f"{query.panel}, {query.legend}: {', '.join(f'{v:.4g}' for v in values)}")
            return wrong
        time.sleep(1)


def _values(client: httpx.Client, query: dashboards.Query) -> list[float]:
    """One number of each series."""
    answer = client.get("/api/v1/query", params={"query": query.filled(INTERVAL)}).json()
    if answer["status"] != "success":
        raise SystemExit(f"{query.panel}: {answer['error']}")
    result: list[dict[str, Any]] = answer["data"]["result"]
    return [float(series["value"][1]) for series in result]


if __name__ == "__main__":
    sys.exit(main())
