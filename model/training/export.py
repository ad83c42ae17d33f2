"""A trained module -> a checkpoint folder in the layout of its family, for `model.weights.loader`.

A model that began as one of its family keeps what lay there: its config.json, the names of its
tensors, its tokenizer's and its sentence-transformers files. A new NV-Embed gets the official ones.
LoRA's adapters are merged on the way. `write_papers` says whose weights these were.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from model.card import card_license, licence_files
from model.config import ModelConfig
from model.errors import CheckpointError
from model.files import read_json
from model.sentence_transformers_export import write_settings
from model.training.adapters import merged_weight
from model.training.network import TrainedNVEmbed, sources
from model.weights.checkpoint import Checkpoint

logger = logging.getLogger("nv_embed.training")
_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
"""What a folder of a family may hold beside weights, config.json and tokenizer.json."""


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The official config.json of these sizes."""
    return {
        "_name_or_path": config.name,
        "architectures": ["NVEmbedModel"],
        "model_type": "nvembed",
        "hidden_size": config.hidden_size,
        "add_eos": True,
        "add_pad_token": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "padding_side": "right",
        "latent_attention_config": {
            "model_type": "latent_attention",
            "hidden_dim": config.hidden_size,
            "latent_dim": config.hidden_size,
            "num_latents_value": config.num_latents,
            "num_cross_heads": config.num_cross_heads,
            "cross_dim_head": config.cross_dim_head,
            "output_normalize": True,
        },
        "text_config": {
            "model_type": "bidir_mistral",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope.theta,
            "rms_norm_eps": config.rms_norm_eps,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }


def export(
    model: TrainedNVEmbed,
    folder: Path,
    tokenizer: Path,
    *,
    dtype: torch.dtype = torch.float16,
    name: str | None = None,
) -> Path:
    """Write a new NV-Embed: config.json, model.safetensors, tokenizer.json (copied). Returns
    `folder`.

    name: who the weights are (`_name_or_path`), the id that a server shows.
    Raises CheckpointError when a weight does not fit `dtype`.
    """
    raw = config_json(model.config)
    raw["_name_or_path"] = name or model.config.name or folder.resolve().name
    raw["torch_dtype"] = str(dtype).removeprefix("torch.")
    _tell_widths(raw, model.config)
    return write_checkpoint(folder, _tensors(model, dtype), raw, tokenizer)


def export_like(
    source: Path,
    model: TrainedNVEmbed,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float16,
    name: str | None = None,
) -> Path:
    """Write the model as the checkpoint `source`, of the same family, is written. Returns `folder`.

    name: as in `export`, by default the source's. Raises CheckpointError when a weight does not
    fit `dtype`.
    """
    raw = read_json(source / "config.json")
    raw["_name_or_path"] = name or model.config.name or source.resolve().name
    said = "dtype" if "dtype" in raw else "torch_dtype"
    raw[said] = str(dtype).removeprefix("torch.")
    _tell_widths(raw, model.config)
    checkpoint = Checkpoint(source)
    checkpoint.check(model.config)
    tensors = {checkpoint.before + key: value for key, value in _tensors(model, dtype).items()}
    write_checkpoint(folder, tensors, raw, source / "tokenizer.json")
    copy_beside(source, folder)
    tell_family(folder, model.config)
    return folder


def _tell_widths(raw: dict[str, Any], config: ModelConfig) -> None:
    """Those that the model was trained for, and not what its start was trained for."""
    raw.pop("matryoshka_dimensions", None)
    if config.matryoshka_dimensions:
        raw["matryoshka_dimensions"] = list(config.matryoshka_dimensions)


def tell_family(folder: Path, config: ModelConfig) -> None:
    """Write down which family the checkpoint in `folder` is of, where what it is made of told that
    by a name alone: its `_name_or_path`, or the option or setting `family`."""
    if _is_told(folder, config):
        return
    write_settings(read_json(folder / "config.json"), folder, config)
    if not _is_told(folder, config):
        logger.warning("%s does not tell its family: serve it by --family", folder)


def _is_told(folder: Path, config: ModelConfig) -> bool:
    try:
        return ModelConfig.from_dir(folder).family.name == config.family.name
    except CheckpointError:
        return False


def copy_beside(source: Path, folder: Path) -> None:
    """What tells a checkpoint's family, its prompts and its special tokens."""
    for name in _BESIDE:
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def _tensors(model: TrainedNVEmbed, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the names of the family's layout."""
    tensors: dict[str, torch.Tensor] = {}
    for parameter, stack in sources(model.config).items():
        value = merged_weight(model, parameter).detach().cpu()
        parts = torch.split(value, [rows for _, rows in stack])
        for (tensor, _), part in zip(stack, parts, strict=True):
            tensors[tensor] = part.to(dtype, copy=True).contiguous()
            if not torch.isfinite(tensors[tensor]).all():
                raise CheckpointError(f"{tensor} does not fit {dtype}: the training diverged")
    return tensors


def write_checkpoint(
    folder: Path, tensors: dict[str, torch.Tensor], raw: dict[str, Any], tokenizer: Path
) -> Path:
    """Write the tensors, config.json (`raw`) and tokenizer.json (copied)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    target = folder / "tokenizer.json"
    if tokenizer.resolve() != target.resolve():
        shutil.copyfile(tokenizer, target)
    return folder


def write_papers(source: Path, folder: Path, how: str) -> None:
    """A model card that names the checkpoint `folder` comes from and that one's licence, which
    the server shows; and copies of its licence and notice files. A card that is there stays.

    how: what was done to it, a sentence.
    """
    name = read_json(source / "config.json").get("_name_or_path")
    name = name or source.resolve().name
    if name.count("/") != 1 or name.startswith("/"):  # no hub id: a path, maybe a private one
        name = Path(name).name
    license_ = card_license(source)
    papers = licence_files(source)
    for path in papers:
        shutil.copyfile(path, folder / path.name)
    matter = {"license": license_, "base_model": name, "library_name": "nv-embed-server"}
    terms = (
        f"Its licence, {license_}, holds for these weights, too."
        if license_
        else "Its folder names no licence in a model card; what holds for it holds here, too."
    )
    copied = f" Copied from it: {', '.join(path.name for path in papers)}." if papers else ""
    title = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_name_or_path"]
    front = yaml.safe_dump({k: v for k, v in matter.items() if v}, sort_keys=False)
    text = f"---\n{front}---\n# {title}\n\nTrained from `{name}`. {how} {terms}{copied}\n"
    card = folder / "README.md"
    if not card.exists():
        card.write_text(text, encoding="utf-8")
