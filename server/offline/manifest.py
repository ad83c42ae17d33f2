"""The manifest beside an output: what a run was made of, and what its files are.

A run goes on with what an earlier one left only if both manifests say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from model.errors import FileError
from model.user_files import open_regular
from server.offline.parts import OutputError, Proof

_TEXTS = ("prefix", "suffix", "examples", "query_instruction")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """None where there is none. Raises OutputError for what is no manifest."""
    try:
        with open_regular(path) as file:
            raw = orjson.loads(file.read())
    except FileNotFoundError:
        return None
    except (ValueError, FileError):
        raw = None
    if not isinstance(raw, dict):
        raise OutputError(f"{path} is not a manifest: remove it, or name another --output")
    return raw


def differences(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """What of `now` the earlier manifest has otherwise, with both values unless one is text of a
    user's."""
    earlier = _flat(then)
    changed = []
    for name, value in _flat(now).items():
        if earlier.get(name) != value:
            hidden = name.startswith("input.") or name in _TEXTS
            changed.append(name if hidden else f"{name} ({earlier.get(name)} then, {value} now)")
    return changed


def proofs_of(manifest: Mapping[str, Any]) -> dict[int, Proof]:
    """What a complete run noted of its files."""
    proofs = {}
    with suppress(KeyError, TypeError, AttributeError):
        for number, file in enumerate(manifest["files"]):
            proofs[number] = Proof(file["size"], file["sha256"], file["made_of"])
    return proofs


@dataclass(frozen=True, slots=True)
class Settled:
    """What a run chose by timing, which the next one on the same machine may choose otherwise."""

    dtype: str | None = None
    products: dict[str, str] = field(default_factory=dict)  # kind -> who computes it


def settled_by(manifest: Mapping[str, Any]) -> Settled:
    """Nothing of what is no such value."""
    model = manifest.get("model")
    if not isinstance(model, dict):
        return Settled()
    dtype, products = model.get("dtype"), model.get("products")
    named = products.items() if isinstance(products, dict) else ()
    return Settled(
        dtype if isinstance(dtype, str) else None,
        {kind: name for kind, name in named if isinstance(name, str)},
    )


def printable(name: str) -> str:
    """Of a file or a folder, whose name need not be UTF-8."""
    return name.encode(errors="replace").decode()


def _flat(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names with dots: model.dtype."""
    flat: dict[str, Any] = {}
    for name, value in manifest.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat
