"""What a report says of the machine, with an nvidia-smi that answers, refuses, or is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.verify.machine import nvidia_smi

pytestmark = pytest.mark.process
ANSWERS = """#!/bin/sh
case "$1" in *pcie*) echo 'Field "pcie" is not a valid field to query.' >&2; exit 2;; esac
echo 'NVIDIA H100 80GB HBM3, GPU-11111111, 580.65, 81559 MiB'
echo 'NVIDIA H100 80GB HBM3, GPU-22222222, 580.65, 81559 MiB'
"""


def program(folder: Path, text: str) -> None:
    (folder / "nvidia-smi").write_text(text)
    (folder / "nvidia-smi").chmod(0o755)


def test_an_old_one_is_asked_for_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, ANSWERS)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    devices = nvidia_smi()
    assert isinstance(devices, list)
    assert [device["driver_version"] for device in devices] == ["580.65", "580.65"]
    ids = [device["uuid"] for device in devices]
    assert len(set(ids)) == 2
    assert not any("GPU-" in each or "1111" in each for each in ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\necho 'No devices were found' >&2; exit 6\n", "No devices were found"),
        ("#!/no/such/shell\n", "nvidia-smi failed"),
    ],
)
def test_one_that_fails(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, text)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert message in str(nvidia_smi())


def test_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert nvidia_smi() == "there is no nvidia-smi"
