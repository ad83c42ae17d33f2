"""gpu-check's server step where the server cannot serve: the report gets the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.verify.conduct import Step, conduct

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[3]
OPTIONS = {
    "seconds": 0.0,
    "lone_runs": 1,
    "lone_tokens": 8,
    "length": 8,
    "max_input_tokens": 64,
    "ready_s": 50.0,
}


@pytest.mark.parametrize(
    ("attention", "runner", "reason"),
    [
        ("sdpa", "tests.server.runners:NoSuchRunner", "NoSuchRunner"),
        ("flash-attn", None, "cannot start: attention 'flash-attn'"),
    ],
)
def test_a_server_that_does_not_get_ready(
    golden_checkpoint: Path,
    tmp_path: Path,
    attention: str,
    runner: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    job = {
        "model_id": "golden",
        "path": str(golden_checkpoint),
        "device": "cpu",
        "attention": attention,
        "base": "float32",
        "work": str(tmp_path),
        "runner": runner,
    }
    step = Step("server", "server", "server.cli.gpu_check_server:serving", 60.0, OPTIONS)
    (outcome,) = conduct([step], job, tmp_path / "log")
    assert outcome.status == "error"
    assert reason in (outcome.error or "")
