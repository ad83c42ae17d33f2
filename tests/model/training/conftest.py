"""A tiny model to train, and tiny data for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig, Rope
from model.training.export import export
from model.training.network import TrainedNVEmbed, initialise_weights
from model.training.teacher import Projection
from tests.checkpoints import official_tokenizer

TINY = ModelConfig(
    vocab_size=32_000,
    hidden_size=32,
    num_hidden_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=128,
    rope=Rope(8, 10_000.0),
    rms_norm_eps=1e-5,
    num_latents=8,
    num_cross_heads=2,
    cross_dim_head=16,
    name="tiny-embed",
)
WORDS = ["red", "green", "blue", "cat", "dog", "fish", "sun", "moon", "star", "car", "boat"]
WORDS += ["train", "bread", "milk", "tea"]


@pytest.fixture(scope="session")
def tiny_checkpoint(golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TrainedNVEmbed(TINY)
    initialise_weights(model, torch.Generator().manual_seed(3))
    folder = tmp_path_factory.mktemp("tiny") / "tiny-embed"
    return export(model, folder, golden_checkpoint / "tokenizer.json", dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral with its output layer and its tokenizer, written by transformers."""
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(4)
    config = MistralConfig(
        vocab_size=32_000,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,  # not width / heads
        intermediate_size=48,
        max_position_embeddings=128,
        sliding_window=4,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("mistral") / "tiny-mistral"
    MistralForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=official_tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.jsonl (a word and a phrase with it), texts.jsonl, vectors/, projection.safetensors."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    rows, texts = [], []
    for number in range(60):
        word, other = WORDS[number % 15], WORDS[(number + 4) % 15]
        positive = f"there is a {word} over here, number {number}"
        negatives = [f"a {other} stands there", f"no {other}"]
        row = {"query": f"{word} {number}", "positive": positive, "negatives": negatives}
        rows.append({**row, "task": "find the phrase", "symmetric": number % 2 == 0})
        texts += [positive, f"{word} and {other} {number}"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "vectors").mkdir()
    vectors = rng.standard_normal((len(texts), 40)).astype(np.float16)
    np.save(folder / "vectors" / "00000.npy", vectors)
    Projection.fit(vectors.astype(np.float32), 32).save(folder / "projection.safetensors")
    return folder
