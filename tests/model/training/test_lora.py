"""LoRA: what it trains, and the whole way from a Mistral to a served NV-Embed."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.encoder import Encoder
from model.errors import UnsupportedError
from model.tokenizer import query_prefix
from model.training.adapters import PROJECTIONS, add_lora
from model.training.network import load_trained
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.states import trained_parameters
from model.training.trainer import Trainer
from tests.server.processes import serving

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
PREFIX = query_prefix("find the phrase")
PROMPTS = [("red 7", PREFIX), ("there is a red over here", ""), ("bread " * 20, ""), ("</s>", "")]


@pytest.fixture(scope="module")
def settings(tiny_mistral: Path, tiny_data: Path) -> TrainingSettings:
    return TrainingSettings(
        model=str(tiny_mistral),
        data={str(tiny_data / "pairs.jsonl"): 1},
        steps=16,
        pairs_per_step=10,
        max_negatives=1,
        tokens_per_pass=300,
        lora_rank=16,
        learning_rate=3e-3,
        warmup_steps=2,
        validate_every=8,
        validation_rows=6,
        save_every=2,
        dtype="float32",
        threads=1,
        name="tuned-embed",
        export_dtype="float32",
    )


@pytest.fixture(scope="module")
def trained(settings: TrainingSettings, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """An uninterrupted run, finished; its module still has its adapters."""
    trainer = Trainer(settings, tmp_path_factory.mktemp("lora") / "whole")
    trainer.run(progress=False)
    return trainer


def unmerged(trainer: Trainer) -> np.ndarray:
    trainer.model.eval()
    with torch.no_grad():
        return trainer.embed(PROMPTS)[0].numpy()


def test_adapters_and_the_pooler_are_trained(tiny_checkpoint: Path) -> None:
    model = load_trained(tiny_checkpoint, device=CPU)
    pooler = {f"pooler.{name}" for name, _ in model.pooler.named_parameters()}
    add_lora(model, rank=3, alpha=6, dropout=0.1)
    names = trained_parameters(model).keys()
    adapters = names - pooler
    assert pooler < names
    assert len(adapters) == 2 * 7 * 2  # A and B of seven projections of two layers
    for layer in range(2):
        for projection in PROJECTIONS:
            owners = [n for n in adapters if f"layers.{layer}." in n and f".{projection}." in n]
            shapes = {n.rsplit(".", 3)[1]: model.get_parameter(n).shape for n in owners}
            assert shapes["lora_A"][0] == shapes["lora_B"][1] == 3, (layer, projection)


def test_other_peoples_kernels_are_not_warned_of(tiny_checkpoint: Path) -> None:
    add_lora(load_trained(tiny_checkpoint, device=CPU), rank=1, alpha=1, dropout=0)
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_without_peft_it_says_what_to_install(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UnsupportedError, match=r"needs peft: \S+ -m pip install .*'peft<"):
        add_lora(load_trained(tiny_checkpoint, device=CPU), rank=1, alpha=1, dropout=0)


def test_a_state_holds_what_is_trained(trained: Trainer) -> None:
    (state,) = trained.folder.glob("state/step-0000016")
    weights = load_file(str(state / "model.safetensors"))
    assert weights.keys() == trained_parameters(trained.model).keys()
    assert not any("embed_tokens" in name or "base_layer" in name for name in weights)
    assert all(weights[name].abs().max() > 0 for name in weights if "lora_B" in name), (
        "an adapter has learnt nothing"
    )
    moments = load_file(str(state / "optimizer.safetensors"))
    assert moments.keys() == {
        "torch_rng",
        *(f"{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")),
    }


def test_the_frozen_matrices_may_be_bfloat16(settings: TrainingSettings, tmp_path: Path) -> None:
    trainer = Trainer(dataclasses.replace(settings, dtype="bfloat16", steps=8), tmp_path)
    kinds = {
        (name.endswith("_proj.weight") or "base_layer" in name, parameter.dtype)
        for name, parameter in trainer.model.backbone.named_parameters()
    }
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    assert {p.dtype for p in trainer.model.pooler.parameters()} == {torch.float32}
    checkpoint = trainer.run(progress=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]), losses
    served = Encoder(checkpoint, device="cpu", dtype="float32").encode(["a cat"])[0]
    trainer.model.eval()
    with torch.no_grad():
        assert served @ trainer.embed([("a cat", "")])[0][0].numpy() > 0.999


def test_a_mistral_becomes_a_served_model(
    settings: TrainingSettings, trained: Trainer, tmp_path: Path
) -> None:
    """`nv-embed train` as a process, killed, started again, served; HTTP against the module."""
    lines = (trained.folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["contrastive"] for line in lines]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4]), losses

    run, log = tmp_path / "run", tmp_path / "log"
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings.to_json()))
    command = [sys.executable, "-m", "server.cli", "train", str(file), "-o", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path, env=environment)
        wanted = f"step-{2 * random.randint(1, 4):07}"
        deadline = time.monotonic() + 60
        while not (run / "state" / wanted).exists() and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()
        assert not (run / "checkpoint").exists(), "it was killed after its last step"
        subprocess.run(command, stdout=out, stderr=out, cwd=tmp_path, env=environment, check=True)
    assert "going on from step" in log.read_text()
    for name in ("state/step-0000016/model.safetensors", "checkpoint/model.safetensors"):
        resumed, whole = load_file(str(run / name)), load_file(str(trained.folder / name))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[key], whole[key]) for key in whole), name

    with serving(run / "checkpoint", log=tmp_path / "server.log") as server:
        (model,) = [m for m in server.client.get("/v1/models").json()["data"] if "-" in m["id"]][:1]
        assert model["id"] == "tuned-embed"
        for (text, prompt), expected in zip(PROMPTS, unmerged(trained), strict=True):
            body = {"model": "tuned-embed", "input": text, "prompt": prompt}
            answer = server.client.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            vector = np.array(answer.json()["data"][0]["embedding"])
            assert np.abs(vector - expected).max() < 1e-5
    before = Trainer(settings, tmp_path / "new")
    assert np.abs(unmerged(before) - unmerged(trained)).max() > 0.01


def test_the_pooler_s_sizes_are_a_mistral_s_only(
    settings: TrainingSettings, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    sized = dataclasses.replace(settings, num_latents=5, cross_dim_head=6)
    assert Trainer(sized, tmp_path).model.pooler.latents.shape == (5, 32)
    other = dataclasses.replace(sized, model=str(tiny_checkpoint))
    with pytest.raises(TrainingSettingsError, match="num_latents, cross_dim_head: sizes of a new"):
        Trainer(other, tmp_path)
