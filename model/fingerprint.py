"""The fingerprint of a checkpoint: equal for the same files, another when any of them is another.

Cheap enough for every start of every process: large weights are sampled. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from model.errors import CheckpointError
from model.families import Family
from model.files import open_regular
from model.weights.headers import INDEX, WeightFile, weight_files

_WHOLE_BYTES = 64 << 20
"""Weight files up to this size are read whole: 40 ms."""
_MOST_BYTES = 128 << 20
"""Of config, tokenizer and index."""
_SAMPLE_BYTES = 4096
_SAMPLES = 4
"""How many pieces of each tensor of a larger file are read, evenly spread. Training and merging
change nearly every number of a tensor that they change."""


def fingerprint(folder: Path) -> str:
    """SHA-256 over config, tokenizer, index, and names, sizes, headers and (samples of the) values
    of the weights. Raises CheckpointError for weights that cannot be read."""
    files = weight_files(folder)
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", INDEX):
        path = folder / name
        if name == INDEX and not path.is_file():
            continue
        with open_regular(path, _MOST_BYTES) as file:
            _add(digest, name, hashlib.file_digest(file, "sha256").digest())
    for weights in files:
        _add(digest, weights.path.name, weights.size.to_bytes(8, "little"), weights.header)
        try:
            with weights.path.open("rb", buffering=0) as file:
                for start, count in _places(weights):
                    file.seek(start)
                    digest.update(file.read(count))
        except OSError as error:
            raise CheckpointError(f"{weights.path} cannot be read: {error}") from None
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, *parts: bytes) -> None:
    """Each part with its length, so that no two lists of parts are the same bytes."""
    for part in (name.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)


def _places(weights: WeightFile) -> Iterator[tuple[int, int]]:
    """Start and length of the pieces to read, in the order of the file."""
    if weights.size <= _WHOLE_BYTES:
        for start in range(0, weights.size, 1 << 20):
            yield start, 1 << 20
        return
    for tensor in sorted(weights.tensors.values(), key=lambda tensor: tensor.start):
        room = max(0, tensor.stop - tensor.start - _SAMPLE_BYTES)
        for start in sorted({tensor.start + room * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
            yield start, min(_SAMPLE_BYTES, tensor.stop - start)


def kind_of_vectors(dtype: str, quantization: str) -> str:
    """What they were computed in."""
    return f"{dtype} {quantization}"


def of_vectors(checkpoint: str, family: Family, dimensions: int, kind: str) -> str:
    """Sixteen hex digits that are equal for vectors that may be compared with one another.

    checkpoint: its fingerprint; kind: see kind_of_vectors; several have a comma between. Queries
    and passages of one model have the same: what is written around them is the family's.
    """
    written = (family.template, family.query, family.passage, family.suffix)
    pooled = (family.mask, family.pooler, family.left_out, str(family.keeps_eos))
    digest = hashlib.sha256()
    _add(digest, checkpoint, *(repr(part).encode() for part in (family.name, *written, *pooled)))
    _add(digest, kind, str(dimensions).encode())
    return digest.hexdigest()[:16]


def require(folder: Path, expected: str) -> None:
    """Raise CheckpointError when the folder does not hold the checkpoint of this fingerprint."""
    if fingerprint(folder) != expected:
        raise CheckpointError(
            f"the model in {folder} is not the one that this server started with: its files have "
            "changed; put them back, or restart the server to serve the new ones"
        )


class Unchanged:
    """Around the reading of a checkpoint: what is exchanged while it is read is read in part."""

    def __init__(self, folder: Path, expected: str | None) -> None:
        """expected: the fingerprint that it must have; None: any will do, and nothing is read.

        Raises CheckpointError when it has another.
        """
        self._folder, self._expected = folder, expected
        if expected is not None:
            self._touched = _touched(folder)
            require(folder, expected)

    def check(self) -> None:
        """At the end. Raises CheckpointError when it has become another."""
        if self._expected is not None and _touched(self._folder) != self._touched:
            require(self._folder, self._expected)


def _touched(folder: Path) -> list[tuple[str, int, int]]:
    """Which file each name of the folder is, and when it was last written."""
    try:
        stats = [(path.name, path.stat()) for path in folder.iterdir() if path.exists()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None
    return sorted((name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats)
