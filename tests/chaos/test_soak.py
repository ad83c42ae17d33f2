"""The soak's machinery in ten seconds: all is answered, nothing is left open. Memory is
still warming up, so that its bound only catches a leak of megabytes a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.soak import Bounds, soak


@pytest.mark.timing
def test_a_short_soak(tmp_path: Path) -> None:
    bounds = Bounds(growth=0.13, p99_ratio=10.0)
    figures = soak(10.0, tmp_path, bounds, windows=5, dtype="float32", sweeps=1)
    assert figures["broken"] == [], figures
    assert figures["requests"].keys() == {"queries", "bulk", "bad", "vanished"}
    assert figures["kills"] >= 1
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    assert (tmp_path / "samples.csv").read_text().startswith("second,front_bytes")
