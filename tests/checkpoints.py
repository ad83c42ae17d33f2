"""Checkpoints for the tests, rebuilt from a recipe: no binary file in the repository.

The golden checkpoint is the one that the authors' own code ran to give tests/golden/golden.json
(the published modeling_nvembed.py under transformers 4.42.4, float32 on a CPU, each text alone).
Its weights are random, drawn per tensor name; its tokenizer is the official one, remade from
the identical pieces in mistral-common's tokenizer.model.v1.

    python -m tests.checkpoints DIR [--size golden|wide|trunk]
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from model.config import ModelConfig
from model.weights.names import expected_shapes

GOLDEN_CASES = Path(__file__).parent / "golden" / "golden.json"

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "golden": {
        "text": {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 160,
        },
        "latent": {"num_latents_value": 32, "num_cross_heads": 4, "cross_dim_head": 48},
    },
    "wide": {
        "text": {
            "hidden_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "intermediate_size": 1536,
        },
        "latent": {"num_latents_value": 64, "num_cross_heads": 8, "cross_dim_head": 512},
    },
    # The benchmarks': 109 M parameters in the backbone, the official pooler's slots.
    "trunk": {
        "text": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 3,
            "intermediate_size": 2432,
        },
        "latent": {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 768},
    },
}


def config_json(size: str = "golden") -> dict[str, Any]:
    """An official config.json with the sizes of one of SIZES."""
    text, latent = SIZES[size]["text"], SIZES[size]["latent"]
    width = text["hidden_size"]
    return {
        "architectures": ["NVEmbedModel"],
        "model_type": "nvembed",
        "hidden_size": width,
        "add_eos": True,
        "add_pad_token": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "padding_side": "right",
        "torch_dtype": "float16",
        "latent_attention_config": {
            "model_type": "latent_attention",
            "hidden_dim": width,
            "latent_dim": width,
            "output_normalize": True,
            **latent,
        },
        "text_config": {
            "model_type": "bidir_mistral",
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_theta": 10000.0,
            "sliding_window": 16,
            "rms_norm_eps": 1e-05,
            **text,
        },
    }


def recipe_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The golden recipe's values of one tensor, float16."""
    x = np.random.default_rng([7, zlib.crc32(name.encode())]).standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        x = 1 + 0.3 * x
    elif name.endswith("bias"):
        x = 0.2 * x
    elif not name.endswith(("embed_tokens.weight", "latents")):
        x = x / np.sqrt(shape[1])
        if name.endswith(("q_proj.weight", "k_proj.weight", "to_q.weight")):
            x = 1.6 * x
    return x.astype(np.float16)


def write_checkpoint(folder: Path, size: str = "golden", shards: int = 2) -> Path:
    """Write a whole checkpoint folder in the official layout; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = config_json(size)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    shapes = expected_shapes(ModelConfig.from_dict(raw))
    weight_map = {}
    names = sorted(shapes)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: recipe_tensor(name, shapes[name]) for name in part}, folder / file)
        (folder / file).chmod(0o644)  # a container's user reads it, too
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return folder


def claim_width(checkpoint: Path, folder: Path, width: int) -> Path:
    """A copy of `checkpoint` that claims another width: for runners that load no weights."""
    shutil.copytree(checkpoint, folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["hidden_size"] = raw["text_config"]["hidden_size"] = width
    raw["latent_attention_config"].update(hidden_dim=width, latent_dim=width)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@cache
def tokenizer_json(markers: tuple[str, ...] = ()) -> str:
    """The official tokenizer.json, with further special tokens."""
    tokenizer = official_tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(marker, normalized=False, special=True) for marker in markers]
    )
    text: str = tokenizer.to_str(pretty=True)
    return text


@cache
def small_tokenizer_json() -> str:
    """tokenizer.json with the pieces of single bytes alone, to be read often."""
    raw = json.loads(_official_json())
    pieces = raw["model"]["vocab"].items()
    raw["model"] |= {"vocab": {piece: i for piece, i in pieces if i < 300}, "merges": []}
    return json.dumps(raw)


def official_tokenizer() -> Tokenizer:
    """NV-Embed's tokenizer.json, remade from the sentencepiece model of Mistral's v1 tokenizer."""
    return tokenizer_of(_official_json())


def tokenizer_of(text: str) -> Tokenizer:
    """`Tokenizer.from_str`, which parses each large vocabulary once in a process: tests read the
    official one hundreds of times, at 70 ms each."""
    first = _parsed(text) if len(text) > 100_000 else None
    return Tokenizer.from_str(text) if first is None else _copied(first)


@lru_cache(maxsize=8)
def _parsed(text: str) -> Tokenizer | None:
    """None where a copy would not be the same: it would lose a truncation and the like."""
    tokenizer = Tokenizer.from_str(text)
    return tokenizer if _copied(tokenizer).to_str() == tokenizer.to_str() else None


def _copied(tokenizer: Tokenizer) -> Tokenizer:
    """Another one with the same vocabulary, which both only read."""
    copy = Tokenizer(tokenizer.model)
    copy.add_special_tokens([t for _, t in sorted(tokenizer.get_added_tokens_decoder().items())])
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(copy, part, value)
    return copy


@cache
def _official_json() -> str:
    import sentencepiece

    file = files("mistral_common") / "data" / "tokenizer.model.v1"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    # A sentencepiece BPE joins the pair whose result has the best score. So the merges are all
    # splits of each piece into two pieces, by the piece's score: by its id, but for runs of spaces,
    # which come last.
    merges = []
    for _, piece in sorted(enumerate(pieces), key=lambda p: (-processor.get_score(p[0]), p[0])):
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in vocabulary and b in vocabulary]
        merges += sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made: str = tokenizer.to_str()
    return made


def golden_cases() -> list[dict[str, Any]]:
    """The authors' outputs: see shape and meaning in tests/golden/README.md."""
    cases: list[dict[str, Any]] = json.loads(GOLDEN_CASES.read_text())
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint in official layout.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="golden")
    arguments = parser.parse_args()
    folder = write_checkpoint(arguments.folder, arguments.size)
    print(f"Random weights, official layout: {folder} (its vectors mean nothing)")


if __name__ == "__main__":
    main()
