"""Start, drain, stop: what a person or an orchestrator does to the process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from model.batch import RunnerOptions
from server.engine.worker import less_memory
from tests.server.processes import ROOT, ServerProcess, is_running, listens, run_cli, serving

pytestmark = pytest.mark.process

SLOW = ("--runner", "tests.server.runners:Hashing")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains(golden_checkpoint: Path, tmp_path: Path, signum: int) -> None:
    """What was accepted is answered, new work is refused, the exit status is 0."""
    server = ServerProcess(
        golden_checkpoint, *SLOW, log=tmp_path / "log", env={"FAKE_SECONDS": "3"}
    ).wait_ready()
    workers = server.worker_pids()
    accepted: list[int] = []
    thread = threading.Thread(target=lambda: accepted.append(server.embed(input="x").status_code))
    thread.start()
    server.wait_for_metric("nv_embed_running_requests", 1)
    server.process.send_signal(signum)
    server.wait_until(lambda: "draining" in server.log, "draining")
    refused = server.client.post("/v1/embeddings", json={"model": "golden-embed", "input": "y"})
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) >= 1
    ready = server.client.get("/readyz")
    assert ready.status_code == 503
    assert "shutting down" in ready.json()["error"]["message"]
    assert server.client.get("/livez").status_code == 200
    thread.join()
    assert accepted == [200]
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.log
    assert not any(map(is_running, workers))
    server.client.close()


def test_a_second_signal_ends_at_once(golden_checkpoint: Path, tmp_path: Path) -> None:
    server = ServerProcess(
        golden_checkpoint, *SLOW, log=tmp_path / "log", env={"FAKE_SECONDS": "20"}
    ).wait_ready()
    threading.Thread(target=lambda: server.embed(input="x")).start()
    server.wait_for_metric("nv_embed_running_requests", 1)
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: "draining" in server.log, "draining")
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(15)  # less than the batch takes
    assert "Traceback" not in server.log
    server.client.close()


def test_the_drain_timeout_bounds_the_wait(golden_checkpoint: Path, tmp_path: Path) -> None:
    server = ServerProcess(
        golden_checkpoint,
        *SLOW,
        *("--drain-timeout", "0.3"),
        log=tmp_path / "log",
        env={"FAKE_SECONDS": "30"},
    ).wait_ready()
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(server.embed(input="x").status_code))
    thread.start()
    server.wait_for_metric("nv_embed_running_requests", 1)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(15) == 0
    thread.join()
    assert statuses == [503]
    assert "Traceback" not in server.log
    server.client.close()


def test_no_worker_outlives_a_killed_server(golden_checkpoint: Path, tmp_path: Path) -> None:
    server = ServerProcess(
        golden_checkpoint,
        *SLOW,
        "--devices",
        "cpu,cpu",
        log=tmp_path / "log",
        env={"FAKE_SECONDS": "30"},
    ).wait_ready()
    workers = server.worker_pids()
    assert workers
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 20  # less than the batches take
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, workers))
    server.client.close()


def test_the_front_never_imports_torch(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Mapped files tell: torch is a shared library of hundreds of megabytes."""
    server = ServerProcess(golden_checkpoint, log=tmp_path / "log").wait_ready()
    assert server.embed(input="x").status_code == 200
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" not in maps
    assert "libtorch" in Path(f"/proc/{server.worker_pids()[0]}/maps").read_text()
    assert server.stop() == 0


def test_before_it_is_ready_it_is_alive_and_says_why(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    server = ServerProcess(golden_checkpoint, log=tmp_path / "log")
    assert server.client.get("/livez").status_code == 200
    early = server.client.get("/readyz")
    assert early.status_code == 503
    assert "loading the model" in early.json()["error"]["message"]
    refused = server.embed(input="x")
    assert refused.status_code == 503
    assert refused.headers["retry-after-ms"]
    assert server.stop() == 0  # stopping while the model loads is quick and clean
    assert "Traceback" not in server.log


def test_sigterm_ends_a_download(tmp_path: Path) -> None:
    """A container's first process would ignore it; here the hub accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
            "HF_HOME": str(tmp_path),
        }
        command = [sys.executable, "-m", "server.cli", "serve", "--model", "owner/name"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        hub.settimeout(30)
        connection, _ = hub.accept()
        with connection:
            process.terminate()
            _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in errors


def test_a_runner_that_cannot_start_ends_the_server(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    server = ServerProcess(
        golden_checkpoint, "--runner", "tests.server.runners:Refusing", log=tmp_path / "log"
    )
    assert server.process.wait(30) == 1
    assert "cannot start: this runner refuses to start" in server.log
    assert "Traceback" not in server.log
    server.client.close()


def test_readiness_is_red_while_no_worker_answers(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*SLOW, "--hang-timeout", "4")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        assert server.embed(input="measured").status_code == 200
        (worker,) = server.worker_pids()
        statuses: list[int] = []
        thread = threading.Thread(
            target=lambda: statuses.append(server.embed(input="x").status_code)
        )
        os.kill(worker, signal.SIGSTOP)
        thread.start()
        with httpx.Client(base_url=server.url, timeout=10) as probe:
            server.wait_until(
                lambda: "no worker has answered lately" in probe.get("/readyz").text, "red"
            )
            assert probe.get("/livez").status_code == 200
        thread.join()
        assert statuses == [200], "another worker served it"
        server.wait_ready()


def test_a_worker_that_cannot_come_back_leaves_the_others_alone(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Once the server has served, the loss of a device must not end it."""
    flag = tmp_path / "device-lost"
    options = ("--runner", "tests.server.runners:LosesItsDevice", "--devices", "cpu,cpu")
    env = {"FAKE_DEVICE_LOST": str(flag)}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)
        flag.touch()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_until(lambda: "cannot start: the device is gone" in server.log, "refused")
        assert server.embed(input="x").status_code == 200
        assert server.client.get("/readyz").status_code == 200
        flag.unlink()
        server.wait_for_metric("nv_embed_workers_ready", 2)


def test_a_worker_that_cannot_be_killed_does_not_keep_the_server(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """As when a GPU falls off the bus: stopped, and deaf to SIGKILL from the server."""
    (tmp_path / "sitecustomize.py").write_text(
        "import subprocess\nsubprocess.Popen.kill = lambda self: None\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    server = ServerProcess(golden_checkpoint, *SLOW, log=tmp_path / "log", env=env).wait_ready()
    (pid,) = server.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    assert server.stop(timeout=20) == 0
    assert "worker 0 cannot be killed" in server.log
    assert "stopped" in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("options", "capability", "advice"),
    [
        ({"device": "cuda:0"}, (9, 0), "or take --quantization float8 or int8"),
        ({"device": "cuda:0"}, (8, 9), "or take --quantization float8 or int8"),
        ({"device": "cuda:0"}, (8, 0), "or take --quantization int8"),
        ({"device": "cuda:0"}, None, "or take --quantization int8"),
        ({"device": "cpu"}, None, "or take --quantization int8-dynamic"),
        ({"device": "cuda:0", "quantization": "int8"}, (9, 0), "or --max-batch-tokens"),
    ],
)
def test_what_to_do_for_want_of_memory(
    options: dict[str, str],
    capability: tuple[int, int] | None,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = SimpleNamespace(get_device_capability=lambda device: capability)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert less_memory(RunnerOptions(path="", **options)).endswith(advice)


def test_a_warming_up_that_does_not_fit_ends_the_server_with_advice(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--runner", "tests.server.runners:TooLarge")
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log")
    assert server.process.wait(30) == 1
    assert "cpu has too little memory to load and run the model: lower --max-input" in server.log
    server.client.close()


def test_a_worker_is_told_of_fused_kernels_and_info_shows_them(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    options = (*SLOW, "--fused-kernels", "triton")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        (device,) = server.client.get("/info").json()["devices"]
        assert device["fused_kernels"] == "triton"
        assert server.says("triton kernels"), server.log


def test_fused_kernels_without_a_gpu_end_the_server(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--device", "cpu", "--fused-kernels", "triton")
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log")
    assert server.process.wait(60) == 1
    assert "fused kernels 'triton' cannot be used on cpu: it runs on CUDA only" in server.log
    server.client.close()


def test_a_start_that_fails_for_the_same_reason_thrice_ends_the_server(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    options = ("--runner", "tests.server.runners:no_such_runner")
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log")
    assert server.process.wait(60) == 1
    assert re.search(r"cannot start: AttributeError.*no_such_runner.*3 times in a row", server.log)
    server.client.close()


def test_a_unix_socket(golden_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    options = ["serve", "--model", str(golden_checkpoint), "--uds", str(path), *SLOW]
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", *options],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        deadline = time.monotonic() + 30
        while not listens(path) and time.monotonic() < deadline:
            time.sleep(0.02)  # the name appears a moment before anybody listens
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://x", timeout=30) as client:
            assert client.get("/livez").status_code == 200
            second = run_cli("serve", "--model", str(golden_checkpoint), "--uds", str(path))
            assert second.returncode == 2
            assert f"cannot listen on {path}: Address already in use (--uds)" in second.stderr
            assert client.get("/livez").status_code == 200
    finally:
        process.terminate()
        assert process.wait(20) == 0
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "neither a folder nor a Hugging Face id"),
        (["--model", "."], "has no config.json"),
        (["--model", "no/folder", "--offline"], "there is no folder no/folder here"),
        (["--max-batch-tokns", "5"], "--max-batch-tokns; did you mean --max-batch-tokens?"),
        (["--model", "MODEL", "--api-key-file", "/none"], "--api-key-file: [Errno 2] No such file"),
        (["--model", "MODEL", "--max-input-tokens", "40000"], "--max-input-tokens 40000 is more"),
        (["--model", "MODEL", "--max-queued-tokens", "5"], "--max-queued-tokens 5 is less than"),
        (["--model", "MODEL", "--port", "many"], "--port: must be a whole number, not"),
        (["--model", "MODEL", "--dtype", "float64"], "--dtype: must be auto, float32, bfloat16"),
        (["--model", "MODEL", "--config", "/none.yaml"], "--config: /none.yaml cannot be read"),
        (["--model", "MODEL", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1:8000"),
        (
            ["--model", "MODEL", "--uds", "/tmp/" + "x" * 120],
            "--uds: a socket's path has at most 107",
        ),
    ],
)
def test_mistakes_stop_the_start_with_a_message(
    golden_checkpoint: Path, arguments: list[str], message: str
) -> None:
    arguments = [str(golden_checkpoint) if a == "MODEL" else a for a in arguments]
    result = run_cli("serve", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_an_unknown_environment_variable_stops_the_start() -> None:
    result = run_cli("serve", env={"NV_EMBED_MAX_BATCH_TOKEN": "5"})
    assert result.returncode == 2
    assert "did you mean NV_EMBED_MAX_BATCH_TOKENS?" in result.stderr


def test_without_a_model_the_shipped_one_serves(tmp_path: Path) -> None:
    server = ServerProcess(None, log=tmp_path / "log").wait_ready()
    try:
        names = [entry["id"] for entry in server.client.get("/v1/models").json()["data"]]
        assert "nv-embed-small" in names
        texts = ["How do I reset my password?", "Passwords and how to change them", "Baking bread"]
        answer = server.client.post(
            "/v1/embeddings", json={"model": "nv-embed-small", "input": texts}
        ).json()
        query, near, far = (item["embedding"] for item in answer["data"])

        def cosine(a: list[float], b: list[float]) -> float:
            return sum(x * y for x, y in zip(a, b, strict=True))

        assert cosine(query, near) > cosine(query, far) + 0.2
    finally:
        assert server.stop() == 0
