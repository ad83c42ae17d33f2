"""What is said where torch sees no GPU, with drivers' files and torch's answers made up."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from model.errors import UnsupportedError
from model.platform import cuda_device
from model.platform.cuda_device import driver_version, runs_on
from model.runner import resolve_device

CLOSED = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
TORCH_2_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The driver's file, not there yet, under a torch for CUDA 13.0 that sees no device."""
    file = tmp_path / "version"
    monkeypatch.setattr(cuda_device, "DRIVER_FILE", file)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return file


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (CLOSED, "535.104.05"),
        (OPEN, "580.65.06"),
        ("NVRM version: NVIDIA UNIX aarch64 Kernel Module  570.86  Thu Jan 1\n", "570.86"),
        ("GCC version: 12.3.0 of something \n", None),
        ("", None),
    ],
)
def test_the_drivers_version(driver: Path, text: str, version: str | None) -> None:
    assert driver_version() is None
    driver.write_text(text)
    assert driver_version() == version


@pytest.mark.parametrize(
    ("cuda", "text", "said"),
    [
        ("13.0", CLOSED, r"is 535\.104\.05, and this torch \(CUDA 13\.0\) needs 580 or.*cu126"),
        ("12.6", CLOSED, r"no CUDA device is visible, though the NVIDIA driver 535\.104\.05"),
        ("13.0", OPEN, r"no CUDA device is visible, though the NVIDIA driver 580\.65\.06 is there"),
        ("13.0", None, r"no CUDA device is visible$"),
        ("99.0", OPEN, r"no CUDA device is visible, though"),
        (None, OPEN, r"this torch is a CPU build; the NVIDIA driver 580\.65\.06 is there"),
        (None, None, r"this torch is a CPU build$"),
    ],
)  # fmt: skip
def test_why_there_is_no_device(
    driver: Path, cuda: str | None, text: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if text:
        driver.write_text(text)
    with pytest.raises(UnsupportedError, match=said):
        resolve_device("cuda:1")


def test_devices_that_are_hidden_are_told_of(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.write_text(OPEN)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(UnsupportedError, match=r"visible \(CUDA_VISIBLE_DEVICES=-1\), though"):
        resolve_device("cuda")


def test_auto_says_why_it_takes_the_cpu(driver: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_device("auto").type == "cpu"
    assert not caplog.text  # no driver: no GPU was to be expected
    driver.write_text(CLOSED)
    with caplog.at_level(logging.WARNING):
        assert resolve_device("auto").type == "cpu"
    assert "running on the CPU: the NVIDIA driver is 535.104.05" in caplog.text


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (TORCH_2_13, (7, 0), False),  # V100
        (TORCH_2_13, (7, 5), True),
        (TORCH_2_13, (8, 9), True),  # by the code for 8.6
        (TORCH_2_13, (9, 0), True),
        (TORCH_2_13, (12, 1), True),
        (TORCH_2_13, (13, 0), True),  # compiled when it is loaded
        (TORCH_2_13[:-1], (13, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["sm_70", "compute_70"], (9, 0), True),
        (["gfx90a", "gfx942"], (9, 4), True),  # not for us to judge
        ([], (9, 0), True),
    ],
)
def test_what_code_runs_on(built_for: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(built_for, capability) is runs


@pytest.mark.parametrize(
    ("name", "capability", "said"),
    [
        ("V100", (7, 0), r"cuda:0 \(V100\) has compute capability 7\.0.*CUDA 13\.0.*sm_75.*cu126"),
        ("New", (13, 0), r"capability 13\.0.*install a newer torch"),
        ("H100", (9, 0), None),
    ],
)
def test_a_card_that_torch_has_no_code_for_is_refused(
    driver: Path,
    name: str,
    capability: tuple[int, int],
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for attribute, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", capability),
        ("get_device_name", name),
        ("get_arch_list", TORCH_2_13[:-1]),
    ):
        monkeypatch.setattr(torch.cuda, attribute, lambda *_, value=value: value)
    if said is None:
        assert resolve_device("cuda") == torch.device("cuda", 0)
        return
    with pytest.raises(UnsupportedError, match=said):
        resolve_device("cuda")
