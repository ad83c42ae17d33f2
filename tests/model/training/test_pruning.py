"""Pruning: what adds nothing goes first, what stays is unchanged, and distilling wins back."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import UnsupportedError
from model.training import teacher
from model.training.embedders import LocalEmbedder
from model.training.export import export
from model.training.network import TrainedNVEmbed, initialise_weights
from model.training.pruning import Sizes, prune
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.trainer import Trainer
from server import cli
from tests.model.training.conftest import TINY, WORDS
from tests.siblings import write_sibling

TEXTS = [f"there is a {WORDS[n]} {WORDS[n + 3]} over here, number {n}" for n in range(12)]
LAYER, KV_HEAD, NEURONS = 1, 0, slice(10, 26)
"""What adds nothing in `padded`."""


@pytest.fixture(scope="module")
def whole(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of three kv heads, whose way back into the residual is as wide as a trained
    model's."""
    config = replace(TINY, num_hidden_layers=3, num_heads=6, num_kv_heads=3, intermediate_size=48)
    model = TrainedNVEmbed(config)
    initialise_weights(model, torch.Generator().manual_seed(7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(10)
    folder = tmp_path_factory.mktemp("whole") / "whole"
    return export(model, folder, golden_checkpoint / "tokenizer.json", dtype=torch.float32)


@pytest.fixture(scope="module")
def padded(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but for a layer, a kv head and neurons that add nothing."""
    folder = tmp_path_factory.mktemp("padded") / "padded"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((whole / name).read_bytes())
    tensors = load_file(str(whole / "model.safetensors"))
    for name, value in tensors.items():
        idle = f"layers.{LAYER}." in name
        if name.endswith("o_proj.weight"):
            value[:, :] *= not idle
            value[:, KV_HEAD * 16 : KV_HEAD * 16 + 16] = 0  # two query heads of 8
        elif name.endswith("down_proj.weight"):
            value[:, :] *= not idle
            value[:, NEURONS] = 0
    save_file(tensors, str(folder / "model.safetensors"))
    return folder


def vectors(folder: Path) -> np.ndarray:
    embed = LocalEmbedder(Encoder(folder, device="cpu", dtype="float32", threads=1))
    return embed(TEXTS, "passage")


def test_what_adds_nothing_goes_and_the_vectors_stay(padded: Path, tmp_path: Path) -> None:
    kept, cosine = prune(padded, tmp_path / "small", TEXTS, Sizes(2, 2, 32))
    assert kept.layers == [0, 2]
    assert kept.kv_heads == [[1, 2], [1, 2]]
    assert kept.neurons == [[*range(10), *range(26, 48)]] * 2
    assert cosine == pytest.approx(1, abs=1e-6)
    config = ModelConfig.from_dir(tmp_path / "small")
    assert (config.num_hidden_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.head_dim, config.intermediate_size) == (8, 32)
    assert np.abs(vectors(tmp_path / "small") - vectors(padded)).max() < 1e-5
    assert "Pruned to 2 layers" in (tmp_path / "small/README.md").read_text()


def test_the_parts_that_matter_most_stay(whole: Path, tmp_path: Path) -> None:
    """Of three layers the one goes without which the vectors move least."""
    kept, cosine = prune(whole, tmp_path / "small", TEXTS, Sizes(layers=2))
    before = vectors(whole)
    near = {}
    tensors = load_file(str(whole / "model.safetensors"))
    for layer in range(3):
        folder = tmp_path / f"without-{layer}"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json"):
            (folder / name).write_bytes((whole / name).read_bytes())
        idle = {
            name: torch.zeros_like(value)
            if f"layers.{layer}." in name and name.endswith(("o_proj.weight", "down_proj.weight"))
            else value
            for name, value in tensors.items()
        }
        save_file(idle, str(folder / "model.safetensors"))
        near[layer] = (vectors(folder) * before).sum(1).mean()
    (gone,) = {0, 1, 2} - {*kept.layers}
    assert gone == max(near, key=lambda layer: near[layer])
    assert cosine == pytest.approx(near[gone], abs=1e-4)
    assert cosine < 0.999  # it mattered


@pytest.mark.parametrize("row", ["gritlm", "nemotron-3-embed", "sfr-embedding-2"])
def test_every_family_is_pruned(row: str, tmp_path: Path) -> None:
    """Its layout, mask and pooler stay: served, the vectors are those that pruning measured."""
    source = write_sibling(tmp_path / "whole", row)
    config = ModelConfig.from_dir(source)
    layers = config.num_hidden_layers - 1
    kept, cosine = prune(source, tmp_path / "small", TEXTS, Sizes(layers=layers))
    small = ModelConfig.from_dir(tmp_path / "small")
    assert small.family.name == config.family.name
    assert small.num_hidden_layers == layers == len(kept.layers)
    found = vectors(tmp_path / "small")
    assert (found * vectors(source)).sum(1).mean() == pytest.approx(cosine, abs=1e-4)


def test_distilling_wins_back_what_was_lost(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way by its commands: prune, the whole model's vectors, train towards them."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3)
    (tmp_path / "texts.jsonl").write_text(lines)
    small = [*("prune", str(whole), "-o", str(tmp_path / "small"), "--threads", "1")]
    small += ["--texts", str(tmp_path / "texts.jsonl"), "--kv-heads", "2"]
    assert cli.main([*small, "--intermediate-size", "24", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "layers that stay: 0, 1, 2" in shown
    words = ["teacher", str(tmp_path / "texts.jsonl"), str(tmp_path / "vectors")]
    monkeypatch.setattr(sys, "argv", [*words, "--checkpoint", str(whole), "--threads", "1"])
    teacher.main()
    settings = TrainingSettings(
        model=str(tmp_path / "small"),
        texts=str(tmp_path / "texts.jsonl"),
        vectors=str(tmp_path / "vectors"),
        texts_per_step=12,
        steps=30,
        learning_rate=3e-3,
        warmup_steps=3,
        validate_every=30,
        dtype="float32",
        threads=1,
    )
    checkpoint = Trainer(settings, tmp_path / "run").run(progress=False)
    assert checkpoint is not None
    before, lost, won = (vectors(folder) for folder in (whole, tmp_path / "small", checkpoint))
    near = [(rows * before).sum(1).mean() for rows in (lost, won)]
    assert near[0] < 0.99
    assert 1 - near[1] < (1 - near[0]) / 2, near
    assert cli.main(small) == 2
    assert "small exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes(), "nothing to leave out"),
        (Sizes(layers=3), "nothing to leave out"),
        (Sizes(layers=4), "--layers is 4, and the model has 3"),
        (Sizes(kv_heads=0), "--kv-heads is 0"),
        (Sizes(intermediate_size=49), "--intermediate-size is 49"),
    ],
)
def test_sizes_that_cannot_be(whole: Path, tmp_path: Path, sizes: Sizes, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        prune(whole, tmp_path / "small", TEXTS, sizes)
    assert not (tmp_path / "small").exists()


def test_vectors_of_another_width_need_a_projection(
    tiny_data: Path, whole: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "00000.npy", np.ones((40, 7), dtype=np.float16))
    settings = TrainingSettings(
        model=str(whole),
        texts=str(tiny_data / "texts.jsonl"),
        vectors=str(tmp_path),
        texts_per_step=4,
        steps=1,
    )
    with pytest.raises(TrainingSettingsError, match=r"have 7 numbers, and .* 32: a projection"):
        Trainer(settings, tmp_path / "run")
