"""What becomes of a real server when the files of its model are wrong, or change under it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.server.processes import run_cli, serving

pytestmark = pytest.mark.process

INDEX = "model.safetensors.index.json"
NORM = "embedding_model.norm.weight"
SHARD = "model-00002-of-00002.safetensors"
CHANGED = "its files have changed; put them back, or restart the server"


@pytest.fixture
def folder(tmp_path: Path, golden_checkpoint: Path) -> Path:
    return Path(shutil.copytree(golden_checkpoint, tmp_path / "golden"))


def change_weights(folder: Path) -> None:
    """Another model of the same shapes, put in the place of the first by a rename."""
    tensors = load_file(folder / SHARD)
    tensors[NORM] = tensors[NORM][::-1].copy()
    save_file(tensors, folder / "new")
    (folder / "new").rename(folder / SHARD)


def test_weights_replaced_while_serving(folder: Path, tmp_path: Path) -> None:
    """The worker that would load the new ones refuses and says why, the other one goes on with
    the old; the first one is back when the files are."""
    kept = folder.parent / "kept"
    shutil.copyfile(folder / SHARD, kept)
    runner = ("--runner", "tests.server.runners:OfItsCheckpoint")
    options = ("--devices", "cpu,cpu", "--cache-bytes", "0", *runner)
    with serving(folder, *options, log=tmp_path / "log") as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)
        [before] = server.vectors(input="the same text")
        change_weights(folder)
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_until(lambda: CHANGED in server.log, "refused")
        for _ in range(10):
            assert server.vectors(input="the same text") == [before]
        assert server.client.get("/readyz").status_code == 200
        assert server.metric("nv_embed_workers_ready") == 1
        kept.rename(folder / SHARD)
        server.wait_for_metric("nv_embed_workers_ready", 2)
        for _ in range(10):
            assert server.vectors(input="the same text") == [before]


def damage(name: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        tensors[name][:] = value
        save_file(tensors, folder / SHARD)

    return change


def set_number(key: str, value: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        raw["text_config"][key] = value
        (folder / "config.json").write_text(json.dumps(raw))

    return change


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (damage(NORM, np.nan), 1, f"cannot start: {NORM} holds NaN or infinity"),
        (set_number("rope_theta", np.nan), 2, "rope_theta is nan"),
        (lambda folder: (folder / SHARD).write_bytes(b"version https://git-lfs"), 2, "Git LFS"),
        (lambda folder: os.mkfifo(folder / "model.safetensors"), 2, "more than one set"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"PK\x03\x04"), 2, "an archive"),
        (lambda folder: (folder / INDEX).write_text("[" * 20_000), 2, "nested too deeply"),
    ],
)
def test_a_server_whose_checkpoint_is_damaged_does_not_start(
    folder: Path, change: Callable[[Path], object], status: int, message: str
) -> None:
    change(folder)
    ended = run_cli("serve", "--model", str(folder), "--device", "cpu", "--port", "0")
    assert (ended.returncode, message in ended.stderr) == (status, True), ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count(message) == 1


def test_a_server_whose_card_is_none(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "README.md")
    runner = ("--runner", "tests.server.runners:Hashing")
    with serving(folder, *runner, log=tmp_path / "log") as server:
        assert server.client.get("/info").json()["license"] is None


@pytest.mark.parametrize(
    "command",
    [
        ("serve",),
        ("encode", "texts.txt"),
        ("verify",),
        ("evaluate", "--sts", "sts.jsonl"),
        ("mine", "examples.jsonl", "-o", "mined.jsonl"),
    ],
)
def test_a_path_that_leads_nowhere(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "texts.txt").write_text("a\n")
    (tmp_path / "sts.jsonl").write_text('{"first": "a", "second": "b", "score": 1}\n' * 3)
    (tmp_path / "examples.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 2)
    arguments = [str(tmp_path / a) if "." in a else a for a in command]
    ended = run_cli(*arguments, "--model", "./missing")
    assert ended.returncode == 2, ended.stderr
    assert "./missing is neither a folder nor" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
