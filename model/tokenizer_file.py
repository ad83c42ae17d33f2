"""Reads tokenizer.json, and refuses what is not Mistral's BPE, of the first kind (pieces of
characters, "▁" for a space) or, for families that have it, of the second (pieces of bytes).

The file is a program of its own: its parts could multiply a text after its length was checked, or
leave merges out at random. Knows nothing of NV-Embed's conventions around the ids.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from model.errors import CheckpointError, MissingFileError
from model.files import read_text, shown

_MOST_BYTES = 64 << 20
"""The official file has 1.8 MB."""
_AFFIX = re.compile(r'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]')
"""Looked for before the library reads the file: at some of them it ends the process."""
_SPACE = "▁"


def read_tokenizer(folder: Path, *, byte_level: bool = False) -> Tokenizer:
    """`folder/tokenizer.json`, neither truncating nor padding. Raises CheckpointError.

    byte_level: whether pieces of bytes will do, too.
    """
    path = folder / "tokenizer.json"
    try:
        text = read_text(path, _MOST_BYTES)
    except MissingFileError:
        raise CheckpointError(f"{folder} has no tokenizer.json") from None
    try:
        if affix := _AFFIX.search(text):
            raise CheckpointError(f"it has the affix {affix[1]}")
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check(tokenizer, byte_level)
        tokenizer.encode("x")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}, unlike NV-Embed's tokenizer") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # bare Exceptions, and Rust's panics, which are not even that
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return tokenizer


def is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether its pieces are runs of bytes, each shown as a character."""
    parts = _parts(tokenizer.pre_tokenizer, "pretokenizers")
    return any(part["type"] == "ByteLevel" for part in parts)


def lowers(tokenizer: Tokenizer) -> bool:
    """Whether it takes small letters for capitals."""
    parts = _parts(tokenizer.normalizer, "normalizers")
    return any(part["type"] == "Lowercase" for part in parts)


def without_lowering(tokenizer: Tokenizer) -> Tokenizer:
    """The same, but for `lowers`."""
    raw = json.loads(tokenizer.to_str())
    parts = _parts(tokenizer.normalizer, "normalizers")
    kept = [part for part in parts if part["type"] != "Lowercase"]
    raw["normalizer"] = {"type": "Sequence", "normalizers": kept}
    return Tokenizer.from_str(json.dumps(raw))


def _check(tokenizer: Tokenizer, byte_level: bool) -> None:
    """Raise CheckpointError for the part that is of another kind."""
    model = tokenizer.model
    if not isinstance(model, BPE):
        raise CheckpointError(f"its model is {type(model).__name__}")
    if model.dropout:
        raise CheckpointError(f"its dropout is {model.dropout}")
    if model.unk_token is not None and tokenizer.token_to_id(model.unk_token) is None:
        raise CheckpointError(f"its unk_token, {shown(model.unk_token)}, is no piece")
    for part in _parts(tokenizer.normalizer, "normalizers"):
        match part:
            # One character in front, one for another, small letters for capitals, which are never
            # fewer: lengths are checked before them.
            case {"type": "Prepend", "prepend": str(added)} if len(added) == 1:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if (
                len(old) == len(new) == 1
            ):
                pass
            case {"type": "Lowercase"}:
                pass
            case _:
                raise CheckpointError(f"its normalizer has {shown(part)}")
    in_bytes = byte_level and is_byte_level(tokenizer)
    for part in _parts(tokenizer.pre_tokenizer, "pretokenizers"):
        match part:
            case {"type": "Metaspace", "replacement": str(space)} if space == _SPACE:
                fits = not in_bytes
            case {"type": "ByteLevel", "add_prefix_space": False}:
                fits = in_bytes
            case {"type": "Split", "behavior": "Isolated", "invert": False}:
                fits = in_bytes  # nothing is lost where it cuts
            case _:
                fits = False
        if not fits:
            raise CheckpointError(f"its pre_tokenizer has {shown(part)}")
    for part in _parts(tokenizer.post_processor, "processors"):
        if part["type"] != "TemplateProcessing" and not (in_bytes and part["type"] == "ByteLevel"):
            raise CheckpointError(f"its post_processor has {shown(part)}")


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or the like, sequences of them laid open, as the file has them."""
    if component is None:
        return []
    todo, parts = [json.loads(component.__getstate__())], []
    while todo:
        part = todo.pop(0)
        if part["type"] == "Sequence":
            todo = [*part[name], *todo]
        else:
            parts.append(part)
    return parts
