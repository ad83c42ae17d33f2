"""Steps in processes of their own: whatever one does, the others are done, the report is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.verify.conduct import Outcome, Step, conduct
from model.verify.report import SCHEMA, SECTIONS, Report

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _measures_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def step(name: str, measure: str, process: str = "one", limit_s: float = 60.0) -> Step:
    return Step(name, process, f"tests.model.measures:{measure}", limit_s)


def job(checkpoint: Path, work: Path) -> dict[str, str]:
    return {
        "model_id": "golden",
        "path": str(checkpoint),
        "device": "cpu",
        "attention": "auto",
        "base": "float32",
        "work": str(work),
    }


def outcomes(steps: list[Step], checkpoint: Path, folder: Path) -> dict[str, Outcome]:
    found = list(conduct(steps, job(checkpoint, folder), folder / "log"))
    assert [outcome.step for outcome in found] == steps  # each once, in their order
    return {outcome.step.name: outcome for outcome in found}


def test_what_fails_costs_the_others_nothing(golden_checkpoint: Path, tmp_path: Path) -> None:
    steps = [
        step("first", "process"),
        step("raises", "raises"),
        step("after an error", "process"),
        step("crashes", "crashes"),
        step("after a crash", "process"),
        step("hangs", "hangs", limit_s=0.5),
        step("after a hang", "process"),
        step("skipped", "is_not_to_be_had"),
        step("failed", "finds_a_fault"),
        step("unknown", "no_such_measure"),
    ]
    found = outcomes(steps, golden_checkpoint, tmp_path)
    statuses = {name: outcome.status for name, outcome in found.items()}
    assert statuses == {
        "first": "done",
        "raises": "error",
        "after an error": "done",
        "crashes": "error",
        "after a crash": "done",
        "hangs": "error",
        "after a hang": "done",
        "skipped": "skipped",
        "failed": "failed",
        "unknown": "error",
    }
    alike = ("first", "after an error", "after a crash", "after a hang")
    pids = [(found[name].result or {})["pid"] for name in alike]
    assert pids[0] == pids[1]  # an error is no reason to load a model again
    assert len(set(pids)) == 3
    assert (found["first"].result or {})["odd"] == "nan"  # JSON has none
    raised = found["raises"].error or ""
    assert raised.startswith("Traceback")
    assert "in raises" in raised
    assert "ValueError: made to fail" in raised
    assert "was ended by SIGSEGV" in (found["crashes"].error or "")
    assert "about to crash" in (found["crashes"].error or "")
    assert "no end after 0.5 s" in (found["hangs"].error or "")
    assert "in hangs" in (found["hangs"].error or "")  # where it was
    assert found["skipped"].error == "not on this machine"


def test_a_process_that_cannot_begin_is_an_error_of_each_step(tmp_path: Path) -> None:
    found = outcomes([step("a", "process"), step("b", "process")], tmp_path / "none", tmp_path)
    for outcome in found.values():
        assert outcome.status == "error"
        assert "config.json" in (outcome.error or "")


def test_the_report_is_whole_after_each_step(tmp_path: Path) -> None:
    report = Report(tmp_path, {"model": "golden"})
    report.write()
    first = report.path
    report.name_card("NVIDIA H100 80GB HBM3")
    assert report.path.name.startswith("nvidia-h100-80gb-hbm3-20")
    report.add("machine", "done", 1.0, {"name": "H100"}, None)
    report.add("forward.bfloat16.512", "done", 2.0, {"p50_ms": 1.5}, None)
    report.add("forward.bfloat16.256", "error", 3.0, None, "Traceback …")
    assert [path.name for path in tmp_path.iterdir()] == [report.path.name] != [first.name]
    data = json.loads(report.path.read_text())
    assert (data["schema"], data["status"], data["model"]) == (SCHEMA, "running", "golden")
    assert data["forward"] == {"bfloat16": {"512": {"p50_ms": 1.5}}}
    assert data["machine"] == {"name": "H100"}
    assert data.keys() >= set(SECTIONS)
    assert data["steps"] == [
        {"name": "machine", "status": "done", "seconds": 1.0},
        {"name": "forward.bfloat16.512", "status": "done", "seconds": 2.0},
        {"name": "forward.bfloat16.256", "status": "error", "seconds": 3.0, "error": "Traceback …"},
    ]
    report.finish("error")
    assert json.loads(report.path.read_text())["status"] == "error"


def test_what_cannot_be_written_leaves_the_last_report(tmp_path: Path) -> None:
    report = Report(tmp_path, {})
    report.add("machine", "done", 1.0, {"name": "H100"}, None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.add("software", "done", 1.0, {"odd": float("nan")}, None)
    assert json.loads(report.path.read_text())["steps"][-1]["name"] == "machine"
