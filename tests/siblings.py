"""Checkpoints of NV-Embed's siblings, rebuilt from recipes in the layout of their authors' files.

tests/golden/siblings/NAME.json holds what the authors' own code returns for them (float32, CPU,
each text alone); tests/golden/README.md says with which versions.

    python -m tests.siblings DIR NAME
"""

from __future__ import annotations

import argparse
import json
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from model.config import ModelConfig
from model.weights.names import expected_shapes
from tests.checkpoints import tokenizer_json

GOLDEN = Path(__file__).parent / "golden" / "siblings"
MARKERS = ("<instruct>", "<query>", "<response>")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MISTRAL: dict[str, Any] = {
    "architectures": ["MistralModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_cache": False,
    "vocab_size": 32000,
}
_E5_PROMPTS = {
    "web_search_query": "Instruct: Given a web search query, retrieve relevant passages that "
    "answer the query\nQuery: ",
    "sts_query": "Instruct: Retrieve semantically similar text.\nQuery: ",
}


@dataclass(frozen=True, slots=True)
class Sibling:
    """One set: its recipe, and what lies beside its weights."""

    family: str
    seed: int
    dtype: str
    config: dict[str, Any]
    before: str = ""  # the names of a whole language model begin so
    pooling: str | None = "lasttoken"  # of 1_Pooling; None: no sentence-transformers files
    prompts: dict[str, str] = field(default_factory=dict)
    modules: int = 3
    max_seq_length: int = 4096
    adds_eos: bool = True  # as its tokenizer_config.json says


SIBLINGS = {
    "e5-mistral": Sibling(
        "e5-mistral",
        11,
        "float16",
        {**_MISTRAL, "intermediate_size": 160, "pad_token_id": 2},
        prompts=_E5_PROMPTS,
    ),
    "sfr-embedding-2": Sibling(
        "e5-mistral",
        12,
        "bfloat16",
        {
            **_MISTRAL,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
        },
        modules=2,
    ),
    "gritlm": Sibling(
        "gritlm",
        13,
        "bfloat16",
        {
            **_MISTRAL,
            "_name_or_path": "GritLM/GritLM-7B",
            "architectures": ["MistralForCausalLM"],
            "auto_map": {
                "AutoModel": "modeling_gritlm7b.MistralModel",
                "AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM",
            },
            "hidden_size": 32,
            "id2label": {"0": "LABEL_0"},
            "intermediate_size": 96,
            "sliding_window": 8,
        },
        before="model.",
        pooling=None,
        adds_eos=False,
    ),
    "bge-en-icl": Sibling(
        "bge-en-icl",
        14,
        "float32",
        {**_MISTRAL, "hidden_size": 32, "intermediate_size": 80, "vocab_size": 32003},
        max_seq_length=32768,
    ),
    "bidirectional-mean": Sibling(
        "bidirectional-mean",
        15,
        "float16",
        {
            **_MISTRAL,
            "intermediate_size": 128,
            "is_causal": False,
            "num_hidden_layers": 2,
            "sliding_window": None,
        },
        pooling="mean_tokens",
        prompts={"query": "query: ", "passage": "passage: "},
        adds_eos=False,
    ),
    "nemotron-3-embed": Sibling(
        "nemotron-3-embed",
        16,
        "bfloat16",
        {
            **{key: value for key, value in _MISTRAL.items() if key != "rope_theta"},
            "architectures": ["Ministral3Model"],
            "dtype": "bfloat16",
            "head_dim": 16,
            "intermediate_size": 128,
            "is_causal": False,
            "model_type": "ministral3",
            "pooling": "avg",
            "rope_parameters": {
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "factor": 4.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
        },
        pooling="mean_tokens",
        prompts={"query": "query: ", "document": "passage: "},
        adds_eos=False,
    ),
}


def tensor(sibling: Sibling, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The recipe's values of one tensor; `name` in full, as in the checkpoint."""
    return _drawn(sibling.seed, sibling.dtype, name, shape)


@cache
def _drawn(seed: int, dtype: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Kept: most tests write the same few checkpoints."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(shape)
    if "norm" in name and name.endswith("weight"):
        x = 1 + 0.3 * x
    elif not name.endswith("embed_tokens.weight"):
        x = x / np.sqrt(shape[1])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            x = 1.6 * x
    if dtype == "float16":  # rounded once: torch goes through float32
        return torch.from_numpy(x.astype(np.float16))
    return torch.from_numpy(x.astype(np.float32)).to(_DTYPES[dtype])


def write_sibling(folder: Path, name: str, config: dict[str, Any] | None = None) -> Path:
    """Write a whole checkpoint folder; config: keys that are other ones. Returns the folder."""
    sibling = SIBLINGS[name]
    folder.mkdir(parents=True, exist_ok=True)
    raw = {**sibling.config, **(config or {})}
    _write(folder / "config.json", raw)
    shapes = expected_shapes(ModelConfig.from_dict(raw, sibling.family))
    tensors = {
        sibling.before + name: tensor(sibling, sibling.before + name, shape)
        for name, shape in shapes.items()
    }
    if sibling.before:
        tensors["lm_head.weight"] = torch.zeros(raw["vocab_size"], raw["hidden_size"])
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{shard:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    _write(
        folder / "tokenizer_config.json",
        {"add_bos_token": True, "add_eos_token": sibling.adds_eos, "legacy": True},
    )
    write_tokenizer(folder, markers=MARKERS if sibling.family == "bge-en-icl" else ())
    if sibling.pooling is not None:
        _write_modules(folder, sibling, raw["hidden_size"])
    return folder


def write_tokenizer(folder: Path, markers: tuple[str, ...] = ()) -> None:
    (folder / "tokenizer.json").write_text(tokenizer_json(markers), encoding="utf-8")


def _write_modules(folder: Path, sibling: Sibling, width: int) -> None:
    """The files by which sentence-transformers loads it."""
    kinds = ["Transformer", "Pooling", "Normalize"][: sibling.modules]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    _write(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    pooling = {f"pooling_mode_{mode}": mode == sibling.pooling for mode in modes}
    _write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **pooling, "include_prompt": True},
    )
    _write(
        folder / "config_sentence_transformers.json",
        {"prompts": sibling.prompts, "default_prompt_name": None},
    )
    bert = {"max_seq_length": sibling.max_seq_length, "do_lower_case": False}
    _write(folder / "sentence_bert_config.json", bert)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


def golden_cases(name: str) -> list[dict[str, Any]]:
    """The authors' values: see tests/golden/README.md."""
    cases: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text())["cases"]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a sibling family.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=SIBLINGS)
    arguments = parser.parse_args()
    folder = write_sibling(arguments.folder, arguments.name)
    print(f"Random weights, the layout of {arguments.name}: {folder} (its vectors mean nothing)")


if __name__ == "__main__":
    main()
