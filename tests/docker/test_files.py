"""What the container files say about the rest of the project, checked without an engine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    return loaded


def test_the_builder_gets_every_file_that_is_copied() -> None:
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    sources = {source for line in copies for source in line.split()}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert sources == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize(
    "path",
    [
        *("Dockerfile", "docker/compose.yaml", "docker/compose.two-gpus.yaml"),
        "docker/healthcheck.py",
    ],
)
def test_no_variable_is_misspelt(path: str) -> None:
    """The server refuses to start with an unknown one."""
    found = re.findall(rf"{ENV_PREFIX}([A-Z_]+)", (ROOT / path).read_text())
    assert found
    assert {name.lower() for name in found} <= set(Settings.model_fields)


def test_stopping_leaves_time_to_drain(compose: dict[str, Any]) -> None:
    drain: float = Settings.model_fields["drain_timeout"].default
    servers = [service for service in compose["services"].values() if "build" in service]
    assert len(servers) == 2
    for service in servers:
        assert float(service["stop_grace_period"].removesuffix("s")) >= drain + 10


def test_each_service_is_hardened(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("torch", "index", "expected"),
    [
        ("default", "", []),
        ("cpu", "", ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]),
        ("cu126", "", ["--extra-index-url", "https://download.pytorch.org/whl/cu126"]),
        ("cu126", "http://mirror", ["--extra-index-url", "http://mirror"]),
        ("gpu", "", None),
        ("", "", None),
    ],
)
def test_where_torch_comes_from(torch: str, index: str, expected: list[str] | None) -> None:
    """The step of the Dockerfile, run up to where it installs."""
    (step,) = re.findall(r"RUN (case .*?esac)", (ROOT / "Dockerfile").read_text(), re.S)
    script = step.replace("\\\n", "\n") + '\nprintf "%s\n" "$@"'
    result = subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, "TORCH": torch, "TORCH_INDEX": index},
        capture_output=True,
        text=True,
    )
    if expected is None:
        assert result.returncode == 2
        assert f"TORCH={torch}: must be" in result.stderr
    else:
        assert result.stdout.split() == expected
