"""Which files of a folder hold the weights, and what their headers say. Torch-free.

One set of weights or none: what could be read in two ways is refused, and an index says exactly
which shard holds which tensor. Reads the headers, never the values.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import CheckpointError
from model.files import impostor, listed, open_regular, parse_json, read_json, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_MOST_BYTES = 16 << 20
"""Of an index, of a header. The official ones have 30 KB."""
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""The types that are read, and the bytes of a number. Others are quantized weights, whose scales
nobody would apply, or no weights."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in its file."""

    dtype: str  # as the format writes it: F32, F16, BF16
    shape: tuple[int, ...]
    start: int  # the first byte in the file
    stop: int


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file whose header has been read and agrees with its size."""

    path: Path
    size: int  # bytes
    header: bytes  # as it stands in the file, its length before it
    tensors: dict[str, StoredTensor]


def weight_files(folder: Path) -> list[WeightFile]:
    """The shards that the folder's index names, else model.safetensors.

    Raises CheckpointError naming the file or the tensor: where something is missing or two sets
    of weights lie in one folder, where index and shards disagree, for other types of numbers.
    """
    weight_map = _weight_map(folder)
    files = [_read_header(folder / name) for name in _names(weight_map)]
    if weight_map:
        _compare(folder / INDEX, weight_map, files)
    return files


def unread_files(folder: Path) -> list[str]:
    """Names of safetensors files that are no part of the weights: adapters, other precisions.

    Raises CheckpointError where it is not clear which files are the weights.
    """
    names = {path.name for path in folder.glob("*.safetensors")}
    return sorted(names - set(_names(_weight_map(folder))))


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> the file that the index says; empty where model.safetensors holds all."""
    try:
        present = {p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name) or p.name == SINGLE}
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    weight_map = _read_index(folder / INDEX) if os.path.lexists(folder / INDEX) else {}
    if not weight_map and SINGLE not in present:
        what = f"{listed(present)} but not their index, {INDEX}" if present else "no weights"
        raise CheckpointError(
            f"{folder} has {what}: it needs {SINGLE}, or {INDEX} and its shards (other weight "
            "formats are not read)"
        )
    names = _names(weight_map)
    if absent := [name for name in names if not os.path.exists(folder / name)]:
        raise CheckpointError(f"{folder} lacks {listed(absent)}; is the download complete?")
    if surplus := present - set(names):
        raise CheckpointError(
            f"{folder} holds more than one set of weights: {INDEX if weight_map else SINGLE}, and "
            f"{listed(surplus)}, not of that set; remove one of them"
        )
    return weight_map


def _names(weight_map: dict[str, str]) -> list[str]:
    return sorted(set(weight_map.values())) or [SINGLE]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> the name of its file."""
    raw = read_json(path, _MOST_BYTES)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} cannot be read: it has no weight_map of tensors to files")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{path} cannot be read: {shown(tensor)} is in {shown(name)}, which is no file name"
            )
        if re.search(r"[/\\\0]", name) or name in (".", ".."):
            raise CheckpointError(f"{path} names files outside its folder: {shown(name)}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names {shown(name)}, which is no safetensors file (other weight formats "
                "are not read)"
            )
    return weight_map


def _compare(index: Path, weight_map: dict[str, str], files: list[WeightFile]) -> None:
    """Raise CheckpointError where a shard holds other tensors than the index says: which of two
    copies is the right one, nobody can tell."""
    for file in files:
        name = file.path.name
        said = {tensor for tensor, shard in weight_map.items() if shard == name}
        problems = []
        if missing := said - file.tensors.keys():
            problems.append(f"missing: {listed(missing)}")
        if surplus := file.tensors.keys() - said:
            others = {weight_map[tensor] for tensor in surplus if tensor in weight_map}
            told = f" (which it gives to {listed(others)})" if others else ""
            problems.append(f"surplus: {listed(surplus)}{told}")
        if problems:
            raise CheckpointError(f"{name} is not as {index} says: {'; '.join(problems)}")


def _read_header(path: Path) -> WeightFile:
    with open_regular(path) as file:
        try:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            size = path.stat().st_size
            if not 2 <= length <= _MOST_BYTES or start[8:9] != b"{":
                # Only then: the length of a header may look like another kind's first bytes.
                what = impostor(start) or f"no safetensors file (it begins with {start[:16]!r})"
                raise CheckpointError(f"{path} cannot be read: it is {what}")
            file.seek(0)
            header = file.read(8 + length)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    if len(header) < 8 + length:
        raise CheckpointError(_cut(path, size, 8 + length))
    raw = parse_json(header[8:], path)
    raw.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, len(header)) for name, entry in raw.items()}
    end = len(header)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != end:
            raise CheckpointError(
                f"{path} cannot be read: {shown(name)} does not begin where the tensor before ends"
            )
        end = tensor.stop
    if end > size:
        raise CheckpointError(_cut(path, size, end))
    if end < size:
        raise CheckpointError(
            f"{path} cannot be read: it has {size:,} bytes, and its tensors end at {end:,}"
        )
    return WeightFile(path, size, header, tensors)


def _cut(path: Path, size: int, needed: int) -> str:
    return (
        f"{path} cannot be read: it has {size:,} bytes of at least {needed:,}; is the download "
        "complete?"
    )


def _stored(path: Path, name: str, entry: Any, header_bytes: int) -> StoredTensor:
    """One entry of a header. Raises CheckpointError naming the tensor."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} cannot be read: no place for {shown(name)}") from None
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise CheckpointError(
            f"{path}: {shown(name)} is {shown(dtype)}; only weights in float32, float16 and "
            f"bfloat16 ({', '.join(_BYTES)}) are read"
        )
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise CheckpointError(f"{path} cannot be read: {shown(name)} is {shown(entry)}")
    if math.prod(shape) * _BYTES[dtype] != stop - start:
        raise CheckpointError(
            f"{path} cannot be read: {shown(name)} of shape {shown(shape)} in {dtype} does not "
            f"fill bytes {start} to {stop}"
        )
    return StoredTensor(dtype, tuple(shape), header_bytes + start, header_bytes + stop)
