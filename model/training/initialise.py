"""A new small model: its sizes, Mistral's tokenizer, token embeddings from the teacher.

    python -m model.training.initialise OUT --texts texts.jsonl --vectors DIR --tokenizer FILE

OUT becomes a checkpoint in the official layout, and holds projection.safetensors, the fixed map
from the teacher's width to the model's, which distillation needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model import console
from model.config import ModelConfig, Rope
from model.training.examples import read_texts
from model.training.export import export
from model.training.network import TrainedNVEmbed, initialise_weights
from model.training.teacher import Projection, Teacher, load_vectors

DEFAULT = ModelConfig(
    vocab_size=32_000,
    hidden_size=256,
    num_hidden_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=768,
    max_position_embeddings=2048,
    rope=Rope(head_dim=64, theta=10_000.0),
    rms_norm_eps=1e-5,
    num_latents=64,
    num_cross_heads=4,
    cross_dim_head=64,
    name="nv-embed-small",
)
"""The shipped model's sizes at first; `deepen` gives it six layers later on."""
PROJECTION_TEXTS = 32_768
"""Vectors whose principal axes the projection takes."""
EMBEDDING_NORM = 4.0
"""Length of a rare token's embedding; a frequent one's is less."""
FREQUENCY_SCALE = 1e-3
"""a of a / (a + p): the weight of a token with probability p (Arora et al. 2017)."""


def piece_texts(tokenizer: Tokenizer) -> list[str]:
    """What each piece of the vocabulary says, by id; control pieces say nothing."""
    pieces = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    return ["" if p.startswith("<") and p.endswith(">") else p.replace("▁", " ") for p in pieces]


def piece_weights(tokenizer: Tokenizer, texts: Sequence[str]) -> NDArray[np.float64]:
    """a / (a + p) of each piece, p counted in `texts`."""
    counts = np.zeros(tokenizer.get_vocab_size())
    for encoding in tokenizer.encode_batch_fast(list(texts)):
        np.add.at(counts, encoding.ids, 1)
    return FREQUENCY_SCALE / (FREQUENCY_SCALE + counts / counts.sum())  # type: ignore[no-any-return]


def new_model(
    config: ModelConfig,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    projection: Projection,
    teacher: Teacher,
    seed: int,
) -> TrainedNVEmbed:
    """Random layers over token embeddings that the teacher gives the pieces."""
    model = TrainedNVEmbed(config)
    initialise_weights(model, torch.Generator().manual_seed(seed))
    pieces = piece_texts(tokenizer)
    rows = teacher.encode(pieces, progress=True) @ projection.matrix
    rows = rows - rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows *= EMBEDDING_NORM * piece_weights(tokenizer, texts)[:, None]
    with torch.no_grad():
        model.backbone.embed_tokens.weight.copy_(torch.from_numpy(rows))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a new small model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, required=True, help="the teacher's, of the texts")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json")
    parser.add_argument("--teacher", help="folder of a sentence-transformers model")
    parser.add_argument("--name", default=DEFAULT.name)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    texts = read_texts(arguments.texts)[:100_000]
    projection = Projection.fit(
        load_vectors(arguments.vectors)[:PROJECTION_TEXTS].astype(np.float32), DEFAULT.hidden_size
    )
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    model = new_model(
        DEFAULT, tokenizer, texts, projection, Teacher(arguments.teacher), arguments.seed
    )
    export(model, arguments.out, arguments.tokenizer, name=arguments.name)
    projection.save(arguments.out / "projection.safetensors")


if __name__ == "__main__":
    sys.exit(console.run("initialise", main))
