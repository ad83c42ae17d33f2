"""A checkpoint's fingerprint: the same for the same files, another when any of them is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from model import fingerprint as module
from model.errors import CheckpointError
from model.fingerprint import fingerprint, require
from model.weights.headers import weight_files


@pytest.fixture
def folder(tmp_path: Path, golden_checkpoint: Path) -> Path:
    return Path(shutil.copytree(golden_checkpoint, tmp_path / "copy"))


def flip(file: Path, place: int) -> None:
    """Change one bit, and neither size nor time."""
    times = file.stat()
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_it_is_of_what_the_files_hold(folder: Path, golden_checkpoint: Path) -> None:
    """Not of where they are, nor of when they were written, nor of the card."""
    for file in folder.iterdir():
        os.utime(file, (0, 0))
    (folder / "README.md").write_text("a card")
    assert fingerprint(folder) == fingerprint(golden_checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_any_change_of_a_small_file_is_another(folder: Path, name: str) -> None:
    before = fingerprint(folder)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))
    assert fingerprint(folder) != before


@pytest.mark.parametrize("tensor", [0, 17, -1])
def test_one_bit_of_weights_that_are_read_whole(folder: Path, tensor: int) -> None:
    before = fingerprint(folder)
    for file in weight_files(folder):
        stored = list(file.tensors.values())[tensor]
        flip(file.path, (stored.start + stored.stop) // 2)
        assert fingerprint(folder) != before
        flip(file.path, (stored.start + stored.stop) // 2)
        assert fingerprint(folder) == before


def test_every_tensor_of_a_large_file_is_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 64)
    before = fingerprint(folder)
    for file in weight_files(folder):
        read = sum(count for _, count in module._places(file))
        assert read < 64 * 4 * len(file.tensors) + 1 < file.size
        for stored in file.tensors.values():
            for place in (stored.start, stored.stop - 1):
                flip(file.path, place)
                assert fingerprint(folder) != before
                flip(file.path, place)
    assert fingerprint(folder) == before


def test_tensors_that_change_names_are_another(folder: Path) -> None:
    """Two shards exchanged for each other: the same bytes in all."""
    before = fingerprint(folder)
    first, second = (file.path for file in weight_files(folder))
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    other = {first.name: second.name, second.name: first.name}
    index.write_text(json.dumps({"weight_map": {t: other[f] for t, f in weight_map.items()}}))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    assert fingerprint(folder) != before


def test_another_checkpoint_than_expected_is_refused(folder: Path) -> None:
    require(folder, fingerprint(folder))
    with pytest.raises(CheckpointError, match="its files have changed; put them back, or restart"):
        require(folder, "0" * 64)


def test_weights_that_cannot_be_read_have_none(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com")
    with pytest.raises(CheckpointError, match="Git LFS"):
        fingerprint(folder)
