"""Which files hold the weights: one reading, or a refusal that names the file and the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.errors import CheckpointError
from model.weights.headers import unread_files, weight_files
from tests.model.test_files import IN_PLACE_OF_A_FILE

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of two tensors each, and their index."""
    folder = tmp_path / "copy"
    folder.mkdir()
    tensors = {name: np.full((2, 3), i, np.float16) for i, name in enumerate("abcd")}
    write_shards(folder, {FIRST: "ab", SECOND: "cd"}, tensors)
    return folder


def write_shards(folder: Path, shards: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add(file: Path, **tensors: np.ndarray) -> None:
    save_file(load_file(file) | tensors, file)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refusal:
        weight_files(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_each_tensor_is_where_the_index_says(folder: Path) -> None:
    files = weight_files(folder)
    assert [file.path.name for file in files] == [FIRST, SECOND]
    assert [sorted(file.tensors) for file in files] == [["a", "b"], ["c", "d"]]
    for file in files:
        raw = file.path.read_bytes()
        assert file.size == len(raw)
        for name, stored in file.tensors.items():
            values = np.frombuffer(raw[stored.start : stored.stop], np.float16)
            assert stored.shape == (2, 3)
            np.testing.assert_array_equal(values, "abcd".index(name))


def test_a_stale_copy_in_another_shard(folder: Path) -> None:
    add(folder / SECOND, a=np.zeros((2, 3), np.float16))
    message = refused(folder)
    assert f"{SECOND} is not as {folder / INDEX} says: surplus: a" in message
    assert f"gives to {FIRST}" in message


def test_a_tensor_in_another_shard_than_the_index_says(folder: Path) -> None:
    tensors = load_file(folder / FIRST)
    add(folder / SECOND, a=tensors.pop("a"))
    save_file(tensors, folder / FIRST)
    assert f"{FIRST} is not as {folder / INDEX} says: missing: a" in refused(folder)


def test_a_tensor_that_the_index_does_not_know(folder: Path) -> None:
    add(folder / SECOND, extra=np.zeros(3, np.float16))
    assert f"{SECOND} is not as {folder / INDEX} says: surplus: extra" in refused(folder)


def test_an_index_that_names_a_tensor_twice(folder: Path) -> None:
    (folder / INDEX).write_text(f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}')
    assert "it has 'a' twice" in refused(folder)


@pytest.mark.parametrize(
    ("surplus", "taken"),
    [
        ("model.safetensors", INDEX),
        ("model-00003-of-00003.safetensors", INDEX),
        ("model-00001-of-00004.safetensors", INDEX),
        (FIRST, "model.safetensors"),
    ],
)
def test_two_sets_of_weights(folder: Path, surplus: str, taken: str) -> None:
    """A newer or an older save beside the one that would be read."""
    if taken == "model.safetensors":
        (folder / INDEX).unlink()
        shutil.copyfile(folder / SECOND, folder / taken)
        (folder / SECOND).unlink()
    else:
        shutil.copyfile(folder / FIRST, folder / surplus)
    message = refused(folder)
    assert "more than one set of weights" in message
    assert surplus in message
    assert taken in message


def test_shards_without_their_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    message = refused(folder)
    assert f"{FIRST}, {SECOND} but not their index" in message


def test_other_safetensors_files_are_told(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "consolidated.safetensors"):
        shutil.copyfile(folder / FIRST, folder / name)
    assert len(weight_files(folder)) == 2
    assert unread_files(folder) == ["adapter_model.safetensors", "consolidated.safetensors"]


def test_links_are_followed(folder: Path) -> None:
    """The hub's cache is made of them: where a link leads, its owner chose, not the index."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, shard in enumerate((FIRST, SECOND)):
        (folder / shard).rename(blobs / f"{number}")
        (folder / shard).symlink_to(Path("../blobs") / f"{number}")
    assert [sorted(file.tensors) for file in weight_files(folder)] == [["a", "b"], ["c", "d"]]
    (blobs / "1").unlink()
    assert f"lacks {SECOND}" in refused(folder)


def test_an_index_may_name_the_single_file(folder: Path) -> None:
    shutil.copyfile(folder / FIRST, folder / "model.safetensors")
    for shard in (FIRST, SECOND):
        (folder / shard).unlink()
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys("ab", "model.safetensors")})
    )
    assert [file.path.name for file in weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no weight_map"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": ["a"]}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "'a' is in 1, which is no file name"),
        ('{"weight_map": {"a": ["x"]}}', "which is no file name"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "no safetensors file"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": ".."}}', "outside its folder"),
        ('{"weight_map": {"a": "c:\\\\x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "x\\u0000.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "lacks absent.safetensors"),
    ],
)
def test_an_index_that_is_none(folder: Path, content: str, message: str) -> None:
    (folder / INDEX).write_text(content)
    assert message in refused(folder)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float64, np.bool_, np.int64])
def test_other_numbers_are_no_weights(folder: Path, dtype: type) -> None:
    add(folder / FIRST, b=np.ones((2, 3), dtype))
    message = refused(folder)
    assert FIRST in message
    assert "'b' is '" in message
    assert "float32, float16 and bfloat16" in message


def test_eight_bit_floats_are_no_weights(folder: Path) -> None:
    """Their scales are tensors of their own, which nobody would apply."""
    write_header(folder / FIRST, {"a": entry("F8_E4M3", [4], 0, 4)}, b"\0" * 4)
    assert "'a' is 'F8_E4M3'" in refused(folder)


@pytest.mark.parametrize(("content", "message"), IN_PLACE_OF_A_FILE)
def test_what_lies_in_place_of_weights(folder: Path, content: bytes, message: str) -> None:
    (folder / FIRST).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{FIRST} cannot be read: .*{message}"):
        weight_files(folder)


def entry(dtype: object, shape: object, start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_header(file: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry("F16", [4], 0, 8)}, bytes(7), "at least"),  # cut
        ({"a": entry("F16", [4], 0, 8)}, bytes(9), "its tensors end at"),
        ({"a": entry("F16", [5], 0, 8)}, bytes(8), "does not fill"),
        ({"a": entry("F16", [4], 8, 0)}, bytes(8), "does not fill"),
        ({"a": entry("F16", [-4], 0, 8)}, bytes(8), "'a' is"),
        ({"a": entry("F16", [True, 4], 0, 8)}, bytes(8), "'a' is"),
        ({"a": entry("F16", [4.0], 0, 8)}, bytes(8), "'a' is"),
        ({"a": entry("F16", "4", 0, 8)}, bytes(8), "'a' is"),
        ({"a": entry("F16", [2**62, 2**62], 0, 8)}, bytes(8), "does not fill"),
        ({"a": entry("F16", [10**400], 0, 8)}, bytes(8), "'a' is"),
        ({"a": entry(["F16"], [4], 0, 8)}, bytes(8), "'a' is"),
        ({"a": entry("F16", [4], 0, 8), "b": entry("F16", [4], 4, 12)}, bytes(12), "begin"),
        ({"a": entry("F16", [4], 2, 10)}, bytes(10), "begin"),
        ({"a": {"dtype": "F16"}}, bytes(8), "no place"),
        ({"a": 1}, bytes(8), "no place"),
        ({"a": "abc"}, bytes(8), "no place"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        (b'{"a": [' + b"[" * 20_000, b"", "nested too deeply"),
        (b"{", b"", "no safetensors file"),
        (b"[1]", b"", "no safetensors file"),
        (b'{"a', b"", "Unterminated"),
    ],
)
def test_a_header_that_does_not_describe_its_file(
    folder: Path, header: object, data: bytes, message: str
) -> None:
    write_header(folder / FIRST, header, data)
    assert message in refused(folder)


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff"])
def test_a_length_that_looks_like_another_kind(folder: Path, magic: bytes) -> None:
    """A header of 35,615 bytes begins as gzip does."""
    header = json.dumps({name: entry("F16", [4], i * 8, i * 8 + 8) for i, name in enumerate("ab")})
    padded = header.encode().ljust(int.from_bytes(magic, "little"))
    write_header(folder / FIRST, padded, bytes(16))
    assert (folder / FIRST).read_bytes().startswith(magic)
    assert [sorted(file.tensors) for file in weight_files(folder)] == [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**64 - 1])
def test_a_header_of_a_length_that_cannot_be(folder: Path, length: int) -> None:
    (folder / FIRST).write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    assert f"{FIRST} cannot be read" in refused(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
def test_a_shard_that_was_cut(folder: Path, keep: int) -> None:
    raw = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(raw[:keep])
    assert f"{FIRST} cannot be read" in refused(folder)


@pytest.mark.parametrize("change", [lambda path: path.mkdir(), lambda path: path.touch()])
def test_what_is_no_index(folder: Path, change: Callable[[Path], object]) -> None:
    (folder / INDEX).unlink()
    change(folder / INDEX)
    assert INDEX in refused(folder)
