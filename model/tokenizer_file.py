"""Reads tokenizer.json, and refuses what is not a tokenizer of NV-Embed's kind: Mistral's BPE.

The file is a program of its own: its parts could multiply a text before anybody counts it, leave
merges out at random, or end the process (the library panics at some). Knows nothing of NV-Embed's
conventions around the ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.errors import CheckpointError, MissingFileError
from model.files import parse_json, read_text, shown

_MOST_BYTES = 64 << 20
"""The official file has 1.8 MB."""
_SPACE = "▁"


def read_tokenizer(folder: Path) -> Tokenizer:
    """`folder/tokenizer.json`, neither truncating nor padding. Raises CheckpointError."""
    path = folder / "tokenizer.json"
    try:
        text = read_text(path, _MOST_BYTES)
    except MissingFileError:
        raise CheckpointError(f"{folder} has no tokenizer.json") from None
    raw = parse_json(text, path)
    try:
        _check(raw)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: it is malformed ({error!r})") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}, unlike NV-Embed's tokenizer") from None
    if raw.get("truncation") or raw.get("padding"):  # not wanted, whatever they say
        text = json.dumps(raw | {"truncation": None, "padding": None})
    try:
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode("x")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and Rust's panics, which are not even that
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tokenizer


def _check(raw: dict[str, Any]) -> None:
    """Raise CheckpointError for the part that is of another kind."""
    model = raw["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"its model is {shown(model['type'])}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(f"its {key} is {shown(model[key])}")
    ids = list(model["vocab"].values())
    if len(set(ids)) < len(ids):
        raise CheckpointError("two of its pieces share an id")
    if model.get("unk_token") not in {None, *model["vocab"]}:
        raise CheckpointError(f"its unk_token, {shown(model['unk_token'])}, is no piece")
    for part in _parts(raw.get("normalizer"), "normalizers"):
        match part:
            case {"type": "Prepend", "prepend": str(added)} if len(added) == 1:
                pass
            # One character for another: the length limits count before the normaliser.
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(old) == len(new) == 1
            ):
                pass
            case _:
                raise CheckpointError(f"its normalizer has {shown(part)}")
    for part in _parts(raw.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] != "Metaspace" or part.get("replacement") != _SPACE:
            raise CheckpointError(f"its pre_tokenizer has {shown(part)}")
    for part in _parts(raw.get("post_processor"), "processors"):
        if part["type"] != "TemplateProcessing":
            raise CheckpointError(f"its post_processor has {shown(part)}")


def _parts(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or the like, a sequence of them laid open."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]
