"""Which GPU each worker gets: from what nvidia-smi lists, by UUID, also when one is lost."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from model.batch import RunnerOptions
from server.engine import devices
from server.engine.devices import (
    Gpu,
    by_uuid,
    choose,
    in_child,
    parse_list,
    visible,
    worker_options,
)
from server.errors import SettingsError
from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS

A, B, C = (f"GPU-{letter * 8}-1111-2222-3333-444444444444" for letter in "abc")
M, N = (f"MIG-{letter * 8}-1111-2222-3333-444444444444" for letter in "de")
OLD_SLICE = f"MIG-{A}/7/0"
"""As drivers before 470 call it."""
LISTED = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A})
GPU 1: NVIDIA A100-SXM4-40GB (UUID: {B})
  MIG 1g.5gb      Device  0: (UUID: {M})
  MIG 1g.5gb      Device  1: (UUID: {N})
GPU 2: NVIDIA GeForce RTX 4090 (24 GB) (UUID: {C})
"""
GPUS = [Gpu(A), Gpu(B, (M, N)), Gpu(C)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LISTED, GPUS),
        (LISTED.replace("\n", "\r\n"), GPUS),
        ("", []),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", []),
        ("No devices were found\n", []),
        (
            "Unable to determine the device handle for gpu 0000:3B:00.0: Unknown Error\n"
            f"GPU 1: NVIDIA L4 (UUID: {B})\n",
            [Gpu(B)],
        ),
        (
            f"GPU 0: A100 (UUID: {A})\n  MIG 3g.20gb Device 0: (UUID: {OLD_SLICE})\n",
            [Gpu(A, (OLD_SLICE,))],
        ),
        ("GPU 0: Orin (nvgpu) (UUID: 54bb1dc8-8b62-5d27-8f2f-7f1d4d1e1a1a)\n", []),
        (f"  MIG 1g.5gb Device 0: (UUID: {M})\n", []),
    ],
)
def test_what_nvidia_smi_lists(text: str, expected: list[Gpu]) -> None:
    assert parse_list(text) == expected


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [A, B, C]),
        ("", []),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("0,-1,2", [A]),
        ("0,7,2", [A]),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,0", []),
        (f"{C},{A}", [C, A]),
        ("GPU-cc,0", [C, A]),
        ("GPU-", []),
        (f"{N},{M}", [N, M]),
        ("MIG-e", [N]),
    ],
)
def test_what_an_environment_leaves_visible(mask: str | None, expected: list[str]) -> None:
    assert [gpu.uuid for gpu in visible(GPUS, mask)] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", "cpu"),
        ("cuda", f"cuda:{A}"),
        ("cuda:0", f"cuda:{A}"),
        ("cuda:2", f"cuda:{C}"),
        ("cuda:1", f"cuda:{M}"),
        (f"cuda:{B}", f"cuda:{M}"),
        (f"cuda:{N}", f"cuda:{N}"),
        (f"cuda:{C}", f"cuda:{C}"),
    ],
)
def test_a_device_by_its_uuid(name: str, expected: str) -> None:
    assert by_uuid(name, GPUS) == expected


@pytest.mark.parametrize("name", ["cuda:3", "cuda:9999", "cuda:GPU-aaaa", "cuda:MIG-1/2/3"])
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}: .* visible are cuda:{A}, cuda:{M}, cuda:{N}"):
        by_uuid(name, GPUS)


def test_a_gpu_that_is_masked_is_not_there() -> None:
    with pytest.raises(SettingsError):
        by_uuid(f"cuda:{A}", visible(GPUS, "1,2"))
    assert by_uuid("cuda:0", visible(GPUS, "1,2")) == f"cuda:{M}"
    assert by_uuid(f"cuda:{N}", visible(GPUS, N)) == f"cuda:{N}"


def test_what_a_worker_is_told() -> None:
    grows = "expandable_segments:True"
    given = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1,2"}
    assert in_child("cpu", given) == ("cpu", given)
    assert in_child("cuda:1", given) == ("cuda:1", {**given, "PYTORCH_ALLOC_CONF": grows})
    assert in_child(f"cuda:{N}", given) == (
        "cuda:0",
        {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": N, "PYTORCH_ALLOC_CONF": grows},
    )
    assert given["CUDA_VISIBLE_DEVICES"] == "1,2"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["max_split_size_mb:512", ""])
def test_an_operators_own_allocator_is_left_alone(name: str, value: str) -> None:
    assert in_child("cuda:0", {name: value})[1] == {name: value}


def test_workers_share_the_cores_and_gpus_have_larger_batches() -> None:
    gpu, one, two = worker_options(RunnerOptions("x"), [f"cuda:{A}", "cpu", "cpu"], 8, None)
    assert (gpu.device, gpu.threads, gpu.max_batch_tokens) == (f"cuda:{A}", None, 8192)
    assert one == two
    assert (one.device, one.threads, one.max_batch_tokens) == ("cpu", 4, 1024)


# With an nvidia-smi on PATH


@pytest.fixture
def smi(tmp_path: Path) -> dict[str, str]:
    """An environment whose nvidia-smi prints the file `listed`, and fails like the real one when
    some GPU does not answer; its calls are counted in `calls`."""
    listed, program = tmp_path / "listed", tmp_path / "bin" / "nvidia-smi"
    listed.write_text(LISTED)
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n[ "$1" = -L ] || exit 2\n'
        f"cat {listed}\n! grep -q Unable {listed}\n"
    )
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.process
def test_numbers_become_uuids(smi: dict[str, str], tmp_path: Path) -> None:
    assert choose(["cuda:2", "cpu", "cuda:0"], smi) == [f"cuda:{C}", "cpu", f"cuda:{A}"]
    assert choose(["cuda:0"], {**smi, "CUDA_VISIBLE_DEVICES": "2"}) == [f"cuda:{C}"]
    with pytest.raises(SettingsError, match="cuda:1"):
        choose(["cuda:1"], {**smi, "CUDA_VISIBLE_DEVICES": "2"})
    (tmp_path / "calls").unlink()
    assert choose(["cpu", "cpu"], smi) == ["cpu", "cpu"]
    assert not (tmp_path / "calls").exists(), "nobody asks for GPUs that are not wanted"


@pytest.mark.process
def test_auto_takes_every_gpu_and_every_slice(
    smi: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count_cuda_devices", lambda environment: 3)
    assert choose(["auto"], smi) == [f"cuda:{uuid}" for uuid in (A, M, N, C)]
    assert choose(["auto"], {**smi, "CUDA_VISIBLE_DEVICES": "2"}) == [f"cuda:{C}"]
    (tmp_path / "listed").write_text(f"Unable to determine the device handle\n{LISTED}")
    assert choose(["auto"], smi) == [f"cuda:{uuid}" for uuid in (A, M, N, C)]
    monkeypatch.setattr(devices, "count_cuda_devices", lambda environment: 0)
    assert choose(["auto"], smi) == ["cpu"], "torch cannot use them"


@pytest.mark.process
@pytest.mark.parametrize("broken", ["absent", "failing", "not a program"])
def test_without_nvidia_smi_numbers_have_to_do(
    broken: str, smi: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "count_cuda_devices", lambda environment: 2)
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n" if broken == "failing" else "")
    if broken == "absent":
        program.unlink()
    assert choose(["auto"], smi) == ["cuda:0", "cuda:1"]
    assert choose(["cuda:5", f"cuda:{A}"], smi) == ["cuda:5", f"cuda:{A}"]


def shown(server: ServerProcess) -> dict[str, dict[str, str]]:
    """Device in /info -> what its worker saw."""
    listed = server.client.get("/info").json()["devices"]
    return {item["device"]: json.loads(item["device_name"]) for item in listed}


@pytest.mark.process
def test_a_lost_gpu_shifts_no_other(
    smi: dict[str, str], golden_checkpoint: Path, tmp_path: Path
) -> None:
    """The first of three; the others' workers die, too, and must come back on their own."""
    present = tmp_path / "present"
    present.write_text(f"{A} {M} {C}")
    env = {**smi, "FAKE_GPUS": str(present), "PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}
    options = ("--devices", f"cuda:0,cuda:{M},cuda:2", "--runner", RUNNERS + "Visible")
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        server.wait_for_metric("nv_embed_workers_ready", 3)
        allocator = "max_split_size_mb:512"
        expected = {f"cuda:{u}": {"mask": u, "allocator": allocator} for u in (A, M, C)}
        assert shown(server) == expected
        present.write_text(f"{M} {C}")
        (tmp_path / "listed").write_text(f"Unable …\nGPU 1: A100 (UUID: {C})\n")
        for pid in server.worker_pids():
            os.kill(pid, signal.SIGKILL)
        server.wait_for_metric("nv_embed_worker_deaths_total", 3)
        server.wait_for_metric("nv_embed_workers_ready", 2)
        del expected[f"cuda:{A}"]
        assert shown(server) == expected
        assert server.embed(input="x").status_code == 200
        server.wait_until(lambda: f"cannot start: cuda:{A}: cuda:0: no CUDA" in server.log, "said")
        present.write_text(f"{A} {M} {C}")
        server.wait_for_metric("nv_embed_workers_ready", 3)
        assert f"cuda:{A}" in shown(server)
    assert (tmp_path / "calls").read_text() == "-L\n", "asked once"


@pytest.mark.process
def test_a_start_on_a_gpu_that_is_not_there_is_a_wrong_call(
    smi: dict[str, str], golden_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=r"(?s)exit 2\).*cuda:3: there is no such GPU"):
        ServerProcess(golden_checkpoint, "--devices", "cuda:3", log=tmp_path / "log", env=smi)
