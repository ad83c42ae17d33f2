"""What can be said of dashboard, alerts and proxies without their programs, which `make
observability-check` and `make drill` run."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ENV_PREFIX, Settings
from tests.docker import dashboards

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def exported(golden_checkpoint: Path) -> set[str]:
    return dashboards.exported(golden_checkpoint)


def test_queries_name_metrics_that_there_are(exported: set[str]) -> None:
    named = {name for query in dashboards.queries() for name in query_names(query.expression)}
    for rule in dashboards.alerts():
        named |= query_names(rule["expr"])
        named |= dashboards.metrics_named(rule["annotations"]["description"])
    assert len(named) >= 25
    assert named <= exported


def query_names(expression: str) -> set[str]:
    return dashboards.metrics_named(re.sub(r'"[^"]*"', "", expression))


def test_the_dashboard_has_twelve_panels_without_a_fault() -> None:
    board = dashboards.dashboard()
    assert len(board["panels"]) == 12
    assert dashboards.problems(board) == []


def test_faults_of_a_dashboard_are_found() -> None:
    def with_fault(**changes: Any) -> list[str]:
        board = deepcopy(dashboards.dashboard())
        board["panels"][3] |= changes
        return dashboards.problems(board)

    panel = dashboards.dashboard()["panels"][3]
    target = panel["targets"][0]
    assert with_fault(id=1)
    assert with_fault(gridPos={"x": 4, "y": 8, "w": 8, "h": 8})
    assert with_fault(targets=[])
    assert with_fault(description="")
    assert with_fault(targets=[target | {"legendFormat": ""}])
    assert with_fault(targets=[target, target])
    assert with_fault(targets=[target | {"expr": 'rate(x{instance=~"$instance"}[5m])'}])
    assert with_fault(targets=[target | {"expr": "rate(x[$__rate_interval])"}])
    assert with_fault(fieldConfig={"defaults": {}})


def test_each_of_the_six_alerts_is_explained_and_tested_both_ways() -> None:
    names = [rule["alert"] for rule in dashboards.alerts()]
    assert len(names) == 6
    operations = (ROOT / "docs/operations.md").read_text()
    tests = yaml.safe_load((dashboards.MONITORING / "alerts_test.yml").read_text())["tests"]
    for name in names:
        assert f"`{name}`" in operations
        (test,) = (one for one in tests if one["name"] == name)
        cases = [case for case in test["alert_rule_test"] if case["alertname"] == name]
        firing = {alert["exp_labels"]["instance"] for c in cases for alert in c["exp_alerts"]}
        instances = set(re.findall(r'instance="(\w+)"', str(test["input_series"])))
        assert firing
        assert instances - firing, "one stays silent"


@pytest.fixture(params=["compose.yaml", "compose.two-gpus.yaml"])
def compose(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker" / request.param).read_text())
    return loaded


def test_what_is_mounted_is_there(compose: dict[str, Any]) -> None:
    mounted = 0
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / "docker" / source).exists(), source
                mounted += 1
            else:
                assert source in compose["volumes"] or source.startswith("${")
    assert mounted


def test_two_servers_have_devices_of_their_own_and_time_to_leave() -> None:
    loaded = yaml.safe_load((ROOT / "docker/compose.two-gpus.yaml").read_text())
    devices = []
    for name in "ab":
        service = loaded["services"][name]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        devices += device["device_ids"]
        given = {k.removeprefix(ENV_PREFIX).lower(): v for k, v in service["environment"].items()}
        options = {k: v for k, v in given.items() if k in Settings.model_fields and v is not None}
        settings = Settings(**(options | {"model": "nvidia/NV-Embed-v2"}))
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace >= settings.drain_delay + settings.drain_timeout + 10
        check = re.search(r"inter (\d)s fall (\d)", (ROOT / "docker/haproxy.cfg").read_text())
        assert check is not None
        assert settings.drain_delay > int(check[1]) * int(check[2])
    assert len(set(devices)) == 2


@pytest.mark.parametrize("path", ["haproxy.cfg", "nginx.conf"])
def test_proxies_wait_longer_than_a_full_queue_and_know_both_servers(path: str) -> None:
    text = (ROOT / "docker" / path).read_text()
    assert {"a:8000", "b:8000"} <= set(re.findall(r"\b[ab]:8000\b", text))
    limits = re.findall(r"(?:timeout server|proxy_read_timeout) (\d+)s", text)
    (seconds,) = map(int, limits)
    assert seconds > Settings.model_fields["body_timeout"].default
