"""The small files of a checkpoint, and what lies in their place when something went wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from model.errors import CheckpointError, MissingFileError
from model.files import read_json, read_text, shown

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"ab" * 32
    + b"\nsize 15701234567\n"
)
IN_PLACE_OF_A_FILE = [
    (LFS_POINTER, "Git LFS pointer.*git lfs pull"),
    (b"<!DOCTYPE html>\n<html>", "HTML or XML page"),
    (b"\n<html><body>404", "HTML or XML page"),
    (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "HTML or XML page"),
    (b"PK\x03\x04\x14\0\0\0", "an archive"),
    (b"\x1f\x8b\x08\0\0\0\0\0", "an archive"),
    (b"", "it is empty"),
    (bytes(4096), "full of zeros"),
]


@pytest.mark.parametrize("text", ['{"a": "é"}', '{\r\n"a": "é"}'])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.json"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text(text, encoding=encoding, newline="")
        assert read_text(file, 1 << 20) == text
        assert read_json(file) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *IN_PLACE_OF_A_FILE,
        ("{}".encode("utf-16"), "UTF-16"),
        ("{}".encode("utf-16-le"), "UTF-16"),
        ("{}".encode("utf-16-be"), "UTF-16"),
        ('{"é": 1}'.encode("latin-1"), "not UTF-8"),
        (b"[" * 20_000, "nested too deeply"),
        (b'{"a":' * 20_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "it has 'a' twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "limit"),
        (b"Entry not found", "Expecting value"),
    ],
)
def test_what_a_file_is_not(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_json(file)
    assert str(file) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "not a regular file"),
        (Path.mkdir, "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to("absent"), "leads to absent, which does not exist"),
        (lambda path: path.write_bytes(bytes((1 << 20) + 1)), "larger than 1 MiB"),
    ],
)
def test_what_is_no_file_is_not_opened(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    """A FIFO would wait for ever for somebody to write into it."""
    make(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=message):
        read_json(tmp_path / "x.json")


def test_a_missing_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"x\.json cannot be read: it does not exist"):
        read_json(tmp_path / "x.json")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "file" / "x.json")


def test_a_value_is_shown_on_one_short_line() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown(10**400)) == 101
    assert shown(10**5000) == "an unprintable int"
    assert shown(deep) == "an unprintable list"
    assert shown(json.loads("[NaN]")) == "[nan]"
