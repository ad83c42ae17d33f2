"""Each benchmark in its shortest form: that it runs and reports, not how fast anything is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.bench import busy, forward, front, large, load, report, serve, versions
from tests.server.processes import ROOT


def report_of(
    main: Callable[[Sequence[str]], None],
    options: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    """Run a benchmark; its last line. Table, raw results and plots must be there, too."""
    main([*options, "--results", str(tmp_path / "results"), "--scratch", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    summary: dict[str, Any] = json.loads(lines[-1])
    name = summary["benchmark"]
    assert lines[0] == f"# {name}"
    assert any(line.startswith("| ---") for line in lines)
    raw = json.loads((tmp_path / "results" / f"{name}.json").read_text())
    assert raw["raw"] or name == "load"
    assert (raw["hardware"], raw["rows"]) == (summary["hardware"], summary["rows"])
    for suffix in (".png", ".svg"):
        assert (tmp_path / "results" / name).with_suffix(suffix).stat().st_size > 1000
    page = (tmp_path / "results" / f"{name}.html").read_text()
    assert page.count("<rect ") >= 1
    assert page.count("<tr><td>") >= len(summary["rows"]) + len(summary["ratios"])
    return summary


def test_forward(
    golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(golden_checkpoint), "--mix", "all-16,lognormal", "--tokens", "100"]
    options += ["--rounds", "1", "--against", "float32:int8-dynamic"]
    summary = report_of(forward.main, options, tmp_path, capsys)
    kinds = {row["what"].removesuffix(" (refused)") for row in summary["rows"]}
    products = {kind for kind in kinds if kind.startswith("products, ")}
    assert "products, torch" in products
    assert kinds - products == {"packed", "packed, float32:int8-dynamic", "padded"}
    bounds = {f"products, {row['by']}" for row in summary["rows"]}
    assert bounds <= products
    assert len(summary["ratios"]) == 10


@pytest.mark.skipif(
    shutil.which("wrk") is None or len(os.sched_getaffinity(0)) < 2,
    reason="needs wrk and two cores",
)
def test_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--connections", "2", "--inputs", "1", "--seconds", "1", "--rounds", "1"]
    summary = report_of(front.main, options, tmp_path, capsys)
    assert all(row["requests"] > 0 for row in summary["rows"])


def test_front_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        front.main([])
    assert "apt-get install wrk" in capsys.readouterr().err


@pytest.mark.slow
def test_serve(golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(golden_checkpoint), "--texts", "70", "--threads", "1"]
    options += ["--loads", "0.5", "--queries", "3", "--bulk-inputs", "100", "--rounds", "2"]
    summary = report_of(serve.main, options, tmp_path, capsys)
    loads = [row["load"] for row in summary["rows"]]
    assert loads[0] == "closed, 32 x 1 text"
    assert all(row["p99_ms"] > 0 for row in summary["rows"] if "p99_ms" in row)


def test_load(golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(golden_checkpoint), "--variants", "float32:none,float32:int8-dynamic"]
    summary = report_of(load.main, options, tmp_path, capsys)
    assert [row["variant"] for row in summary["rows"]] == ["float32:none", "float32:int8-dynamic"]
    assert summary["rows"][1]["kept_gb"] < summary["rows"][0]["kept_gb"]


@pytest.mark.slow
def test_busy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--busy", "1", "--texts", "16"]
    summary = report_of(busy.main, options, tmp_path, capsys)
    assert [(row["how"], row["variant"]) for row in summary["rows"]] == [
        ("serve", "default"),
        ("encode", "default"),
    ]
    assert all(row["times"] > 0 for row in summary["rows"])


@pytest.mark.slow
def test_versions(
    golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(golden_checkpoint), "--rounds", "1", "--seconds", "0.05"]
    summary = report_of(versions.main, [*options, "--against", str(ROOT)], tmp_path, capsys)
    assert [row["case"] for row in summary["rows"]] == list(versions.CASES)
    assert all(row["ms"] > 0 and row["other_ms"] > 0 for row in summary["rows"])


def test_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rounds", "1", "--seconds", "1", "--clients", "2", "--inputs", "70"]
    kinds = ("nothing", *large.KINDS)
    summary = report_of(large.main, [*options, "--size", "200000"], tmp_path, capsys)
    assert [row["load"] for row in summary["rows"]] == list(kinds)
    assert all(row["requests"] > 0 for row in summary["rows"][1:])
    assert all(row["query_p50_ms"] > 0 for row in summary["rows"])


def test_percentiles() -> None:
    assert report.percentile([3, 1, 2], 0.5) == 2
    assert report.percentile(range(100), 0.99) == 99
