"""What an orchestrator does to the process and asks of one: leave, be whole, or give up."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.server.processes import ServerProcess, run_cli, serving
from tests.server.questions import RUNNERS

pytestmark = pytest.mark.process

HASHING = ("--runner", RUNNERS + "Hashing")
LOSES = ("--runner", RUNNERS + "LosesItsDevice")
LINKS = {"NV_EMBED_PORT": "tcp://10.0.0.1:8000", "NV_EMBED_SERVICE_HOST": "10.0.0.1"}


def test_a_service_named_as_the_server_does_not_keep_it_from_starting(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    with serving(golden_checkpoint, *HASHING, log=tmp_path / "log", env=LINKS) as server:
        assert server.embed(input="x").status_code == 200
        assert server.says("NV_EMBED_PORT, NV_EMBED_SERVICE_HOST"), server.log
        assert "enableServiceLinks: false" in server.log


def test_it_serves_on_while_the_load_balancer_takes_notice(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """Clients that come on new connections, and those that stay, lose nothing until the delay is
    over; each answer asks its client to go."""
    options = (*HASHING, "--drain-delay", "2.5")
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log").wait_ready()
    assert "connection" not in server.embed(input="x").headers
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: server.client.get("/readyz").status_code == 503, "leaving")
    assert server.metric("nv_embed_draining") == 1
    seen: Counter[str] = Counter()
    while server.process.poll() is None:
        try:
            answer = httpx.post(f"{server.url}/v1/embeddings", json={"input": f"{len(seen)}"})
        except httpx.HTTPError:
            seen["refused"] += 1
            continue
        seen[f"{answer.status_code} {answer.headers.get('connection')}"] += 1
    assert seen.keys() <= {"200 close", "503 close", "refused"}, seen
    assert seen["200 close"] >= 3, seen
    assert server.process.returncode == 0
    assert "leaving: not ready any more" in server.log
    assert "draining" in server.log
    server.client.close()


def test_a_second_signal_cuts_the_delay_short(golden_checkpoint: Path, tmp_path: Path) -> None:
    options = (*HASHING, "--drain-delay", "3600")
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log").wait_ready()
    server.process.send_signal(signal.SIGTERM)
    server.wait_until(lambda: "leaving: not ready" in server.log, "leaving")
    assert server.stop(signal.SIGTERM) == 0, "nobody waits for an answer"


def test_without_a_worker_there_is_nothing_to_delay_for(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    server = ServerProcess(golden_checkpoint, "--drain-delay", "3600", log=tmp_path / "log")
    assert server.stop() == 0


def test_with_too_few_workers_it_is_not_ready_but_serves(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    lost = tmp_path / "lost"
    env = {"FAKE_DEVICE_LOST": str(lost)}
    options = (*LOSES, "--devices", "cpu,cpu", "--min-ready-workers", "2")
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        assert server.metric("nv_embed_workers_ready") == 2, "ready means both"
        lost.touch()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_until(lambda: "1 of 2 workers" in server.client.get("/readyz").text, "red")
        assert server.embed(input="x").status_code == 200
        lost.unlink()
        server.wait_ready()


def test_a_server_whose_only_device_is_lost_for_good_ends(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    lost = tmp_path / "lost"
    options = (*LOSES, "--exit-after-failed-starts", "3")
    env = {"FAKE_DEVICE_LOST": str(lost)}
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log", env=env).wait_ready()
    lost.touch()
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    assert server.process.wait(30) == 1
    assert "failed to start 3 times in a row" in server.log
    assert server.log.count("cannot start: the device is gone") == 3
    assert "Traceback" not in server.log
    server.client.close()


def test_a_lost_device_ends_a_server_only_where_the_others_are_too_few(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    """And then what they have accepted is answered."""
    lost = tmp_path / "lost"
    env = {"FAKE_DEVICE_LOST": str(lost), "FAKE_SECONDS": "3"}
    ending = ("--exit-after-failed-starts", "2")
    options = (*LOSES, "--devices", "cpu,cpu", *ending, "--min-ready-workers", "2")
    server = ServerProcess(golden_checkpoint, *options, log=tmp_path / "log", env=env).wait_ready()
    lost.touch()
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    server.wait_until(lambda: "the device is gone" in server.log, "refused")
    statuses: list[int] = []
    client = threading.Thread(target=lambda: statuses.append(server.embed(input="x").status_code))
    client.start()
    assert server.process.wait(30) == 1
    client.join()
    assert statuses == [200]
    assert "1 of 2 workers are left" in server.log
    server.client.close()


def test_more_ready_workers_than_there_are_stop_the_start(golden_checkpoint: Path) -> None:
    result = run_cli(
        *("serve", "--model", str(golden_checkpoint), "--device", "cpu"),
        *("--min-ready-workers", "2"),
    )
    assert result.returncode == 2
    assert "--min-ready-workers 2 is more than the 1 that there are" in result.stderr


def test_an_answer_says_where_its_time_went(golden_checkpoint: Path, tmp_path: Path) -> None:
    env = {"FAKE_SECONDS": "0.3"}
    options = (*HASHING, "--max-batch-seqs", "1")
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        began = time.monotonic()
        answer = server.embed(input=["a", "b"])  # two batches
        passed_ms = (time.monotonic() - began) * 1000
        stages = {
            name: float(ms)
            for name, ms in re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])
        }
        assert list(stages) == ["tokenize", "queue", "forward", "write"]
        assert stages["forward"] >= 600
        assert sum(stages.values()) <= passed_ms
        refused = server.embed(input="")
        assert refused.status_code == 400
        assert "server-timing" not in refused.headers
