from __future__ import annotations

import gc
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from model import runner as runner_module
from model.batch import Encoding, RunnerOptions
from model.config import ModelConfig
from model.errors import CheckpointError, UnsupportedError
from model.fingerprint import fingerprint
from model.hub import locate
from model.platform import products, resources
from model.runner import ModelRunner, resolve_device, resolve_dtype
from model.weights.loader import load_model
from tests.model.torches import by_mkls_instructions

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_info_says_what_runs(golden_checkpoint: Path) -> None:
    runner = ModelRunner(RunnerOptions(path=str(golden_checkpoint), dtype="float32"))
    assert (runner.info.device, runner.info.dtype, runner.info.attention, runner.info.width) == (
        "cpu", "float32", "sdpa", 64,
    )  # fmt: skip
    runner.warm_up()
    rows = runner.embed([Encoding(np.array([1, 5, 2], dtype=np.int32))] * 2)
    assert (rows.shape, rows.dtype) == ((2, 64), np.float32)
    runner.close()


def write_changed(folder: Path, name: str, factor: float) -> None:
    """Multiply one tensor of the checkpoint."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = (tensors[name].astype(np.float32) * factor).astype(tensors[name].dtype)
    save_file(tensors, shard)


def test_another_checkpoint_than_expected_is_refused(
    tmp_path: Path, golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(golden_checkpoint, tmp_path / "copy"))
    options = RunnerOptions(str(folder), dtype="float32", fingerprint=fingerprint(folder))
    ModelRunner(options).close()

    def load_while_they_change(*args: Any, **kwargs: Any) -> Any:
        loaded = load_model(*args, **kwargs)
        write_changed(folder, "embedding_model.norm.weight", 0.5)
        return loaded

    monkeypatch.setattr(runner_module, "load_model", load_while_they_change)
    with pytest.raises(CheckpointError, match="its files have changed"):
        ModelRunner(options)
    monkeypatch.setattr(runner_module, "load_model", None)  # not even begun
    with pytest.raises(CheckpointError, match="its files have changed"):
        ModelRunner(options)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelRunner(options)


def test_vectors_that_are_too_large_for_the_precision_stop_the_warm_up(
    tmp_path: Path, golden_checkpoint: Path
) -> None:
    folder = Path(shutil.copytree(golden_checkpoint, tmp_path / "copy"))
    write_changed(folder, "embedding_model.layers.0.mlp.down_proj.weight", 60_000)
    write_changed(folder, "embedding_model.layers.0.mlp.up_proj.weight", 10_000)
    ModelRunner(RunnerOptions(str(folder), dtype="float32")).warm_up()
    runner = ModelRunner(RunnerOptions(str(folder), dtype="float16"))
    with pytest.raises(UnsupportedError, match="NaN or infinite in float16"):
        runner.warm_up()


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    for name, message in (("tpu", "unknown device"), ("mps", "not supported")):
        with pytest.raises(UnsupportedError, match=message):
            resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu() -> None:
    assert resolve_device("auto") == CPU
    with pytest.raises(UnsupportedError, match="no CUDA device is visible"):
        resolve_device("cuda:1")


def test_float16_on_a_processor_is_warned_of(
    golden_config: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for name, device, warned in (
        ("float16", CPU, True),
        ("bfloat16", CPU, False),
        ("float16", CUDA, False),
    ):
        caplog.clear()
        resolve_dtype(name, device, golden_config)
        assert ("float16 slowly: it is for GPUs" in caplog.text) == warned


def test_dtypes(golden_config: ModelConfig) -> None:
    assert resolve_dtype("float16", CPU, golden_config) == torch.float16
    with pytest.raises(UnsupportedError, match="known: auto, float32, bfloat16, float16"):
        resolve_dtype("float8", CPU, golden_config)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_auto_on_a_gpu(
    golden_config: ModelConfig,
    capability: tuple[int, int],
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_dtype("auto", CUDA, golden_config) == expected


@pytest.mark.parametrize(
    ("fast", "free", "expected"),
    [
        (True, 10**12, torch.bfloat16),
        (False, 10**12, torch.float32),
        (False, None, torch.float32),
        (False, 1_000_000, torch.bfloat16),
    ],
)
def test_auto_on_a_processor(
    golden_config: ModelConfig,
    fast: bool,
    free: int | None,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dtype = torch.bfloat16 if fast else torch.float32
    monkeypatch.setattr(products, "fastest_dtype", lambda *_: dtype)
    monkeypatch.setattr(resources, "available_memory", lambda: free)
    with caplog.at_level(logging.WARNING):
        assert resolve_dtype("auto", CPU, golden_config) == expected
    assert ("slower on this processor" in caplog.text) == (free == 1_000_000)


def test_the_peak_of_anonymous_memory_is_seen() -> None:
    with resources.PeakMemory() as peak:
        before = peak.bytes or resources.anonymous_memory()
        block = np.ones(16_000_000)  # 128 MB
        time.sleep(0.05)
        del block
    assert 120e6 < peak.bytes - before < 200e6


@pytest.mark.parametrize("collecting", [True, False])
def test_what_is_made_for_good_is_not_collected(collecting: bool) -> None:
    before = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    frozen = gc.get_freeze_count()
    try:
        with resources.for_good():
            assert not gc.isenabled()
        assert gc.isenabled() == collecting
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("name", [None, "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_sets_about_waiting_stands(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "7")
    resources.let_waiting_threads_sleep()
    seen = {n: os.environ.get(n) for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    unset = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}
    assert seen == unset | ({name: "7"} if name else {"GOMP_SPINCOUNT": "10000"})


def test_this_machine() -> None:
    assert resources.usable_cores() >= 1
    available = resources.available_memory()
    assert available is None or available > 0


_MANY_SHAPES = """
import sys
import numpy as np
from model.platform import resources
with resources.for_good():
    from model.batch import Encoding, RunnerOptions
    from model.runner import ModelRunner
dtype, _, quantization = sys.argv[2].partition(":")
runner = ModelRunner(
    RunnerOptions(
        sys.argv[1], dtype=dtype, quantization=quantization or "none", threads=1,
        cpu_products="allow-slow",
    )
)
runner.warm_up()
def embed(lengths):
    for length in lengths:
        runner.embed([Encoding(np.full(length, 7, dtype=np.int32), length // 3)])
embed(range(16, 257, 16))
before = resources.anonymous_memory()
embed(range(1, 257))
print((resources.anonymous_memory() - before) / 1e6)
"""


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model's first two. All others multiply the same shapes as the first, and the last
    is served apart: unrounded, six cost no more memory (77 MB each), and three times the time."""
    folder = tmp_path_factory.mktemp("two-layers") / "small"
    shutil.copytree(locate(None).path, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not re.search(r"model\.layers\.[2-9]\.", n)}
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.mark.process
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float32:int8-dynamic"])
@by_mkls_instructions("", "SSE4_2")
def test_lengths_never_seen_before_cost_no_memory(
    two_layers: Path, precision: str, instructions: str
) -> None:
    """Unrounded, these 240 took 680 MB in bfloat16, which nothing ever gives back. With MKL on its
    least instructions oneDNN's products are the faster ones in float32, too."""
    command = [sys.executable, "-c", _MANY_SHAPES, str(two_layers), precision]
    environment = {**os.environ, "MKL_ENABLE_INSTRUCTIONS": instructions}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert float(done.stdout) < 40, done.stdout
