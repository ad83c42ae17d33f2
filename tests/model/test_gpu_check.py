"""gpu-check on the emulated device: the whole report, also when steps fail or the run is killed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.errors import UnsupportedError
from model.hub import ModelSource
from model.verify import gpu_check, plan
from model.verify.conduct import conduct
from model.verify.report import SCHEMA, SECTIONS
from tests.model.gpu_check_device import CHANGES
from tests.model.torches import HAS_VARLEN
from tests.siblings import SIBLINGS, write_sibling

pytestmark = pytest.mark.process
ROOT = Path(__file__).parents[2]
BRIEF = plan.Effort(
    seconds=0.0,
    batch_tokens=96,
    lengths=(16,),
    more_lengths=(20,),
    max_input_tokens=64,
    lone_runs=3,
    part_seconds=0.0,
    rows=(16, 32),
    attention_lengths=(16,),
    copied_megabytes=1,
)
DEVICE = "tests.model.gpu_check_device"


def options(checkpoint: Path, folder: Path) -> gpu_check.Options:
    return gpu_check.Options(
        ModelSource("golden", checkpoint, None, None),
        "cuda",
        "auto",
        folder,
        BRIEF,
        server="server.cli.gpu_check_server:serving",
        within=f"{DEVICE}:device",
        runner=f"{DEVICE}:runner",
    )


@pytest.fixture(scope="module")
def run(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any]]:
    """Exit status and report of one run, also where xdist's workers share these tests."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    found = shared / "gpu-check.json"
    with (shared / "gpu-check.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            found.write_text(json.dumps(run_once(golden_checkpoint, tmp_path_factory)))
    status, report = json.loads(found.read_text())
    return status, report


def run_once(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any]]:
    """int8 is the step that fails: bitsandbytes takes raw pointers, which an emulated device does
    not have."""
    folder = tmp_path_factory.mktemp("gpu-check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        status = gpu_check.run(options(golden_checkpoint, folder))
    (path,) = folder.iterdir()  # nothing half-written, and no vectors
    assert path.name.startswith("emulated-h100-20")
    return status, json.loads(path.read_text())


FAILING = ["start.int8", "forward.int8.16", "parity.int8"]
RECORDED = [
    f"{part}.{kind}.recorded" for part in ("lone", "fused") for kind in ("bfloat16", "float8")
]
SKIPPED = [] if HAS_VARLEN else RECORDED
KERNEL, OTHERS = ("varlen", ["padded", "sdpa"]) if HAS_VARLEN else ("padded", ["sdpa"])


def test_every_step_is_in_the_report(run: tuple[int, dict[str, Any]]) -> None:
    _, report = run
    steps = {step["name"]: step for step in report["steps"]}
    planned = [*plan.first_steps(), *plan.steps(BRIEF, "bfloat16", "module:serving")]
    assert list(steps) == [step.name for step in planned]
    for name, step in steps.items():
        expected = "error" if name in FAILING else "skipped" if name in SKIPPED else "done"
        assert step["status"] == expected, step
    assert report["schema"] == SCHEMA
    for section in SECTIONS:
        assert report[section], section


def test_a_step_that_fails_is_there_with_its_traceback(run: tuple[int, dict[str, Any]]) -> None:
    status, report = run
    assert status == 1
    assert report["status"] == "error"
    for step in report["steps"]:
        if step["name"] in FAILING:
            assert step["status"] == "error"
            assert step["error"].startswith("Traceback")
            assert "bitsandbytes" in step["error"]


def test_what_was_measured(run: tuple[int, dict[str, Any]]) -> None:
    _, report = run
    machine, parity = report["machine"], report["parity"]
    assert (machine["name"], machine["capability"]) == ("Emulated H100", [9, 0])
    assert machine["serves_in"] == "bfloat16"
    assert machine["system"]["cores"] >= 1
    assert report["software"]["packages"]["torch"]
    for variant, least in (("bfloat16", 0.999), ("float16", 0.9999), ("float8", 0.98)):
        cosines = parity[variant]["cosines"]
        assert len(cosines) == 8
        assert least < min(cosines) < 1.0, variant
    assert 0.98 < parity["accumulation"]["slow_and_float32"] < 1.0
    names = [check["name"] for check in parity["parts"]["checks"]]
    compared = {f"{other} and {KERNEL}" for other in OTHERS}
    assert {"CUDA graphs and eager", "alone and together", *compared} <= set(names)
    for variant in ("bfloat16", "float8"):
        assert parity["bits"][variant]["alone_and_together"]["of"] == 8
        for stage in ("context", "load", "warm_up"):
            assert report["start"][variant][stage]["seconds"] > 0
        full = report["forward"][variant]["16"]
        assert full["tokens"] == 96
        assert full["tokens_per_s"] > 0
        assert full["p10_ms"] <= full["p50_ms"] <= full["p90_ms"]
        share = full["products_ms"] / full["p50_ms"]
        assert share > 0
        assert full["share_of_products"] == pytest.approx(share)
        assert report["lone"][variant]["eager"]["host_ms"] > 0
        if HAS_VARLEN:
            assert report["lone"][variant]["recorded"]["p50_ms"] > 0
            assert report["start"][variant]["recording"]["seconds"] > 0
            assert parity["bits"][variant]["recorded_and_eager"]["of"] == 8
        fused = report["fused"][variant]
        assert fused["16"]["tokens_per_s"] > 0
        assert fused["parity"]["smallest_to_plain"] > 0.99
        assert fused["eager"]["p50_ms"] > 0
    shares = [
        full["share_of_products"]
        for variant in ("bfloat16", "float8")
        for full in report["forward"][variant].values()
    ]
    assert min(shares) < 1, shares  # each is of two moments, and others work meanwhile
    for name in plan.KERNELS:
        kernel = report["fused"]["kernels"][name]
        assert kernel["checks"][0]["status"] == "passed"
        assert kernel["times_as_fast"] == pytest.approx(kernel["plain_ms"] / kernel["fused_ms"])
    assert report["products"]["float8"]["gate_up"]["32"]["tflops"] > 0
    assert report["products"]["attention"]["kernel"] == KERNEL
    assert report["profile"]["full"]["operations"]
    assert report["faults"]["out_of_memory"]["budget"] < 96
    assert report["server"]["tokens_per_s"] > 0
    assert report["server"]["lone_p50_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_every_step_is_right_for_each_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "e5-mistral" and os.environ.get("FAMILIES") != "full":
        pytest.skip("half a minute each: make test-families runs it")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    effort = replace(BRIEF, float16=False, int8=False, accumulations=False, fused_models=False)
    if name == "e5-mistral":
        effort = replace(effort, server=False)
    folder = tmp_path / "report"
    folder.mkdir()
    checkpoint = write_sibling(tmp_path / name, name)
    status = gpu_check.run(replace(options(checkpoint, folder), effort=effort))
    (path,) = folder.iterdir()
    report = json.loads(path.read_text())
    wrong = [s for s in report["steps"] if s["status"] != "done" and s["name"] not in SKIPPED]
    assert not wrong, wrong
    assert status == 0


CHECKS = ("parity.tokens", "parity.parts", "parity.backbone")


@pytest.mark.slow
@pytest.mark.parametrize("name", SIBLINGS)
def test_a_family_that_is_changed_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mask, pooler, EOS, template: by those of its steps that compare the parts."""
    if name != "e5-mistral" and os.environ.get("FAMILIES") != "full":
        pytest.skip("a quarter of a minute each: make test-families runs it")
    checkpoint = write_sibling(tmp_path / name, name)
    family = ModelConfig.from_dir(checkpoint).family
    causal, has_eos = family.mask == "causal", family.keeps_eos is not None
    expected: list[tuple[dict[str, object], set[str]]] = [
        ({}, set()),
        ({"mask": "full" if causal else "causal"}, {"parity.parts", "parity.backbone"}),
        ({"pooler": "mean" if family.pooler == "last" else "last"}, {"parity.parts"}),
        ({"keeps_eos": None if has_eos else True}, {"parity.tokens"}),
        (
            {"query": "query:"} if family.template is None else {"template": "{task}: "},
            {"parity.tokens"},
        ),
    ]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = {"model_id": name, "path": str(checkpoint), "family": "auto", "device": "cuda"}
    job |= {"attention": "auto", "base": "bfloat16", "work": str(tmp_path)}
    job |= {"within": f"{DEVICE}:of_another_family"}
    steps = [
        replace(step, process="one")
        for step in plan.steps(BRIEF, "bfloat16", None)
        if step.name in CHECKS
    ]
    assert len(steps) == len(CHECKS)
    for changes, failing in expected:
        monkeypatch.setenv(CHANGES, json.dumps(changes))
        outcomes = {o.step.name: o for o in conduct(steps, job, tmp_path / "log")}
        assert {n for n, o in outcomes.items() if o.status == "failed"} >= failing, outcomes
        assert {o.status for o in outcomes.values()} <= {"done", "failed"}, outcomes
        assert changes or {o.status for o in outcomes.values()} == {"done"}, outcomes


def test_a_run_that_is_killed_leaves_what_it_had(golden_checkpoint: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.model import test_gpu_check as test;"
        "from model.verify import gpu_check;"
        "gpu_check.run(test.options(Path(sys.argv[1]), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, str(golden_checkpoint), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b"start.bfloat16"):
                break
        children = _children(process.pid)
        process.send_signal(signal.SIGKILL)
    # It may have died while it wrote the next one, beside it and hidden.
    (path,) = (one for one in (tmp_path / "out").iterdir() if not one.name.startswith("."))
    report = json.loads(path.read_text())
    assert report["status"] == "running"
    done = [step["name"] for step in report["steps"]]
    assert done[:4] == ["machine", "machine.system", "software", "start.bfloat16"]
    assert report["start"]["bfloat16"]["load"]["seconds"] > 0
    assert children
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "its processes outlive it"
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_without_a_device_the_report_says_so(
    golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = gpu_check.Options(
        ModelSource("golden", golden_checkpoint, None, None), "cuda:7", "auto", tmp_path
    )
    with pytest.raises(UnsupportedError, match="cuda:7"):
        gpu_check.run(here)
    (path,) = tmp_path.iterdir()
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(path))
    report = json.loads(path.read_text())
    assert report["status"] == "error"
    assert [step["name"] for step in report["steps"]] == ["machine", "machine.system", "software"]
    assert report["machine"]["system"]["nvidia_smi"]
    assert report["software"]["packages"]["torch"]
