"""What the sentence-transformers files of a checkpoint folder say of its forward.

modules.json, 1_Pooling/config.json, config_sentence_transformers.json, sentence_bert_config.json:
each may be missing. Reads and checks them; what follows for a family, `model.detection` knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import CheckpointError, MissingFileError
from model.files import read_json, shown

_MODES = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_NAMES = {"lasttoken": "last", "mean": "mean", "cls": "cls", "max": "max"}
"""Of `pooling_mode`, as newer releases write it."""
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class SentenceTransformersFiles:
    """Of one folder; nothing, where it has none."""

    pooling: str | None = None
    """last, mean, or what no family pools."""
    include_prompt: bool = True
    """Whether the prefix is pooled, too."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> prefix."""
    max_seq_length: int | None = None
    others: tuple[str, ...] = ()
    """Modules that are none of a family's."""

    @classmethod
    def of(cls, folder: Path) -> SentenceTransformersFiles:
        """Read those of a folder. Raises CheckpointError for one that cannot be understood."""
        modules = _read(folder / "modules.json", list)
        kinds = [
            str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "?"
            for module in modules or []
        ]
        pooling = _read(folder / "1_Pooling" / "config.json", dict) or {}
        bert = _read(folder / "sentence_bert_config.json", dict) or {}
        if bert.get("do_lower_case"):
            kinds.append("do_lower_case")
        return cls(
            _mode(pooling, folder),
            pooling.get("include_prompt") is not False,
            _prompts(folder / "config_sentence_transformers.json"),
            _length(bert, folder),
            tuple(kind for kind in kinds if kind not in _MODULES),
        )


def _read(path: Path, kind: type) -> Any:
    """The parsed JSON of a file that may be missing."""
    try:
        found = read_json(path)
    except MissingFileError:
        return None
    if not isinstance(found, kind):
        raise CheckpointError(f"{path} holds {shown(found)}, no {kind.__name__}")
    return found


def _mode(pooling: dict[str, Any], folder: Path) -> str | None:
    chosen = [name for key, name in _MODES.items() if pooling.get(key) is True]
    if isinstance(named := pooling.get("pooling_mode"), str):
        chosen.append(_NAMES.get(named, named))
    if len(set(chosen)) > 1:
        raise CheckpointError(
            f"{folder / '1_Pooling' / 'config.json'} asks for {' and '.join(chosen)} at once"
        )
    return chosen[0] if chosen else None


def _prompts(path: Path) -> dict[str, str]:
    found = (_read(path, dict) or {}).get("prompts") or {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise CheckpointError(f"{path}: its prompts are {shown(found)}, texts by name are needed")
    return dict(found)


def _length(bert: dict[str, Any], folder: Path) -> int | None:
    length = bert.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 3):
        path = folder / "sentence_bert_config.json"
        raise CheckpointError(f"{path}: max_seq_length is {shown(length)}")
    return length
