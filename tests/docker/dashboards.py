"""The dashboard and the alerts as data: their queries, what they name, what is wrong with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from model.hub import locate
from server.engine.engine import EmbeddingEngine
from server.http.app import create_app
from server.settings import Settings

MONITORING = Path(__file__).parents[2] / "docker/monitoring"
_METRIC = re.compile(r"\b((?:nv_embed|process|vllm:)\w+)\b")
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Query:
    """One line of a panel."""

    panel: str
    legend: str
    expression: str

    def filled(self, interval: str) -> str:
        """As Grafana sends it, for all servers."""
        return self.expression.replace("$__rate_interval", interval).replace("$instance", ".*")


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((MONITORING / "dashboard.json").read_text())
    return loaded


def queries() -> Iterator[Query]:
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield Query(panel["title"], target["legendFormat"], target["expr"])


def alerts(path: Path = MONITORING / "alerts.yml") -> list[dict[str, Any]]:
    groups = yaml.safe_load(path.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exported(checkpoint: Path) -> set[str]:
    """Names of the metrics that a server has, as queries write them."""
    settings = Settings(devices=["cpu"], api_key=["name:some-key"])
    engine = EmbeddingEngine(settings, locate(str(checkpoint)))
    create_app(settings, engine, engine.metrics)
    registry = engine.metrics.registry
    collectors = [name for name in registry._names_to_collectors if "event_loop_tasks" not in name]
    families = registry.restricted_registry(collectors).collect()
    ours = {one.name + "_total" * (one.type == "counter") for one in families}
    return ours | {"process_resident_memory_bytes"}  # the library's, which does not say its names


def metrics_named(text: str) -> set[str]:
    """Without what a histogram puts behind its name."""
    found = (re.sub("_(bucket|sum|count)$", "", name) for name in _METRIC.findall(text))
    return set(found)


def problems(board: dict[str, Any]) -> list[str]:
    """What would not show, or would mislead."""
    found = []
    panels = board["panels"]
    if len({panel["id"] for panel in panels}) < len(panels):
        found.append("two panels have one id")
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        if taken & cells or place["x"] + place["w"] > 24:
            found.append(f"{panel['title']}: lies on another, or outside")
        taken |= cells
        if not panel["targets"] or not panel["description"]:
            found.append(f"{panel['title']}: no query, or no description")
        if not panel["fieldConfig"]["defaults"].get("unit"):
            found.append(f"{panel['title']}: no unit")
        if len({target["refId"] for target in panel["targets"]}) < len(panel["targets"]):
            found.append(f"{panel['title']}: two queries have one name")
        for target in panel["targets"]:
            if not target["legendFormat"] or target["datasource"] != _SOURCE:
                found.append(f"{panel['title']}: no legend, or another data source")
            if 'instance=~"$instance"' not in target["expr"]:
                found.append(f"{panel['title']}: not of the chosen servers")
            if re.search(r"\[\d", target["expr"]):
                found.append(f"{panel['title']}: a fixed interval")
    return found
