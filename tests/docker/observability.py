"""`make observability-check`: Prometheus' own judgement of config, rules and their tests, and each
query of each panel against a real Prometheus that scrapes a real server under load; then each alert
by its real fault.

Ends with status 1 where anything is wrong or a program is missing.
"""

from __future__ import annotations

import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from tests.checkpoints import write_checkpoint
from tests.docker import alert_faults, dashboards, prometheus
from tests.server.processes import ServerProcess
from tests.server.questions import RUNNERS, WORDS

INTERVAL = "12s"
"""For Grafana's $__rate_interval: four scrapes and more."""


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
        checkpoint = write_checkpoint(Path(folder) / "golden")
        wrong = [
            *_problems_of_queries(Path(folder), checkpoint),
            *alert_faults.problems(Path(folder), checkpoint),
        ]
    print("\n".join(wrong) or "every query gives finite numbers, every alert its fault")
    return 1 if wrong else 0


def _promtool(*arguments: str) -> None:
    subprocess.run(["promtool", *arguments], cwd=dashboards.MONITORING, check=True)


def _problems_of_queries(folder: Path, checkpoint: Path) -> list[str]:
    options = ("--runner", f"{RUNNERS}Hashing", "--no-access-log", "--cache-bytes", "100000000")
    server = ServerProcess(checkpoint, *options, log=folder / "log").wait_ready()
    stop = threading.Event()
    load = threading.Thread(target=_load, args=(server.url, stop))
    load.start()
    try:
        with prometheus.watching(folder, server.url) as client:
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
    return wrong


def _load(url: str, stop: threading.Event) -> None:
    """Requests of many sizes, some of them known already, some refused."""
    dice = random.Random(18)
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.is_set():
            texts = [" ".join(dice.choices(WORDS, k=dice.randint(1, 300))) for _ in range(8)]
            for body in ({"input": texts}, {"input": texts[:2]}, {"input": []}):
                client.post("/v1/embeddings", json=body)
            time.sleep(0.02)


def _until_right(client: httpx.Client) -> list[str]:
    """What is wrong with the queries, once nothing is or the patience is over."""
    deadline = time.monotonic() + prometheus.PATIENCE_S
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
