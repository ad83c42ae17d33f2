"""Files as users have them: marked, in other encodings, or no files at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from model.errors import FileError
from model.user_files import check_encoding, open_regular, read_text

TEXT = "alpha beta\ngamma\n"


def test_the_mark_of_utf8_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for raw in (TEXT.encode(), TEXT.encode("utf-8-sig")):
        file.write_bytes(raw)
        assert read_text(file) == TEXT


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize(
    "text", [TEXT, "привет мир\n" * 3, "γειά σου κόσμε\n", "नमस्ते दुनिया\n", "x"]
)
def test_wide_encodings_are_named(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(FileError, match=r"a\.txt is UTF-(16|32)\S*, not UTF-8.*iconv -f UTF-"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text", [TEXT, "a\0b\n", "one text\0and\0another\n", "1\t2\t3\t\n", "", "日本語\n", "a"]
)
def test_utf8_is_not_taken_for_another(text: str) -> None:
    check_encoding(text.encode(), "a.txt")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ncafé\n".encode("latin-1"))
    with pytest.raises(FileError, match=r"a\.txt, line 2: not UTF-8"):
        read_text(tmp_path / "a.txt")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name, message in (
            ("fifo", "is a pipe"),
            ("folder", "is a folder"),
            ("/dev/null", "is a device"),
            ("socket", "is a socket"),
        ):
            with pytest.raises(FileError, match=message):
                open_regular(tmp_path / name)


def test_a_link_to_a_file_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "link").symlink_to("a.txt")
    assert read_text(tmp_path / "link") == TEXT
