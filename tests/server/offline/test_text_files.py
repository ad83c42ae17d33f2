"""Which rows a file holds, and what is said of files that hold none."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from model.errors import FileError
from server.offline import text_files
from server.offline.kinds import Kind
from server.offline.places import InputFileError
from server.offline.sources import opened
from server.offline.text_files import read_objects, read_texts
from tests.server.processes import ROOT

OBJECTS = b'{"text": "alpha beta"}\n{"text": "gamma"}\n'
TEXTS = ["alpha beta", "gamma"]


def texts_of(path: Path | str, field: str = "text") -> list[str]:
    with opened(str(path)) as source:
        return [line.text for line in read_texts(source, field)]


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbfalpha beta\r\ngamma\r\n"),
        ("a.TXT", b"alpha beta\ngamma"),
        ("notes", b"alpha beta\ngamma\n"),
        ("a.txt", b"\xef\xbb\xbfalpha beta\n\xef\xbb\xbfgamma\n"),  # two files, joined by cat
        *((f"a{suffix}", OBJECTS) for suffix in (".JSONL", ".jsonlines", ".Json", ".NdJson", "")),
        ("a.jl", b"\xef\xbb\xbf" + OBJECTS),
        ("a.jsonl", OBJECTS + b"\n  \n"),
        ("a.jsonl", OBJECTS.replace(b"\n", b"\n\n\r\n")),
        ("a.jsonl", b'\n{"text": "alpha beta", "score": NaN}\n"gamma"\n'),
    ],
)
def test_the_same_rows_however_they_are_written(tmp_path: Path, name: str, content: bytes) -> None:
    assert texts_of(write(tmp_path, name, content)) == TEXTS


def test_a_carriage_return_within_a_text_stays(tmp_path: Path) -> None:
    long = "one\rtwo " + "x" * 5000
    assert texts_of(write(tmp_path, "a.txt", f"{long}\nb\n".encode())) == [long, "b"]


def test_a_mark_alone_is_no_text(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path, "a.txt", b"\xef\xbb\xbf")) == []
    assert texts_of(write(tmp_path, "b.jsonl", b"\xef\xbb\xbf\n")) == []


def test_half_of_a_surrogate_pair_is_one_replacement_character(tmp_path: Path) -> None:
    raw = (
        b'{"text": "cut \\ud83d"}\n"\\udc00 b"\n{"text": "whole \\ud83d\\ude00", "x": "\\ud83d"}\n'
    )
    assert texts_of(write(tmp_path, "a.jsonl", raw)) == [
        "cut \ufffd",
        "\ufffd b",
        "whole \U0001f600",
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "a.pq", "a.txt", "a"])
def test_parquet_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nalpha\n", "unknown kind of file '.csv'"),
        ("a.data", b"alpha\n", "unknown kind of file '.data'"),
        ("a.jsonl.bak", OBJECTS, "unknown kind of file '.bak'"),
        ("a.jsonl.txt", OBJECTS, "called text, but its first line is a JSON object"),
        ("a.txt.gz", gzip.compress(b"alpha\n", mtime=0), "compressed with gzip"),
        ("a.txt", b"\x28\xb5\x2f\xfd\0\0", "compressed with zstd"),
        ("a.txt", b"PK\x03\x04\0\0", "a zip archive or an Office file"),
        ("a.parquet", OBJECTS, "is no Parquet file"),
        ("a.txt", b"one\rtwo\rthree\r", "lines end in CR alone"),
        ("a.txt", "alpha\n".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.txt", "alpha\ngamma\n".encode("utf-16-le"), "is UTF-16LE, not UTF-8"),
        ("a.jsonl", '{"text": "привет"}\n'.encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(FileError, match=message.replace("(", r"\(")):
        texts_of(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\n\n\n", "line 2: the text is empty (a blank line at the end: remove it)"),
        ("a.txt", b"one\n\ntwo\n", "line 2: the text is empty"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', "line 3: expected a string or an object"),
        ("a.jsonl", b'{"text": ""}\n', "line 1: the text is empty"),
        ("a.jsonl", b"not json\n", "line 1: not a line of JSON ("),
        ("a.jsonl", b'{"text":\n"a"}\n', "line 1: not a line of JSON ("),
        ("a.jsonl", b'"\xff"\n', "line 1: not UTF-8: convert the file first"),
        ("a.json", b'["a", "b"]\n', "line 1: a JSON array; a value a line is needed"),
        ("a.json", b'[\n{"text": "a"}\n]\n', "line 1: a JSON array over several lines"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: a JSON array over several lines"),
        ("a.jsonl", b'{"a":' * 100_000, "line 1: not a line of JSON (it is nested too deeply)"),
        ("a.jsonl", b'{"custom_id": "a", "body": {}}\n', "batch files: --openai-batch)"),
        ("a.jsonl", b'{"body": "a"}\n', "line 1: no field 'text' (--field names it)"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputFileError) as caught:
        texts_of(write(tmp_path, name, content))
    assert message in str(caught.value)


def test_broken_parquet_and_empty_cells_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), whole)
    with pytest.raises(InputFileError, match=r"row 2: expected a string$"):
        texts_of(whole)
    with pytest.raises(InputFileError, match=r"row 1: expected a string$"):
        texts_of(whole, "n")
    for cut in (8, 100):
        broken = write(tmp_path, "b.parquet", whole.read_bytes()[:-cut])
        with pytest.raises(InputFileError, match="not to be read"):
            texts_of(broken)


def test_a_long_line_is_refused_before_it_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1 << 20)
    for name, quote in (("a.txt", ""), ("a.jsonl", '"')):
        content = f"{quote}ok{quote}\n{quote}{'x' * (3 << 20)}{quote}\n"
        with pytest.raises(InputFileError, match="line 2: longer than 1 MiB"):
            texts_of(write(tmp_path, name, content.encode()))


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, message in ((tmp_path / "fifo", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(FileError, match=f"is {message}"):
            texts_of(name)
    with pytest.raises(FileError, match="/dev/zero is a device"):
        texts_of("/dev/zero")


@pytest.mark.process
@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
@pytest.mark.parametrize("content", [b"\xef\xbb\xbfalpha beta\ngamma\n", OBJECTS])
def test_a_pipe_is_read_as_it_comes(name: str, content: bytes) -> None:
    program = (
        "from server.offline.sources import opened\n"
        "from server.offline.text_files import read_texts\n"
        f"with opened({name!r}) as source:\n"
        "    print(*(line.text for line in read_texts(source, 'text')), sep='|')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], input=content, capture_output=True, cwd=ROOT, check=True
    )
    assert run.stdout.decode().splitlines() == ["|".join(TEXTS)]


def test_a_descriptor_that_cannot_be_is_no_file() -> None:
    with pytest.raises(FileNotFoundError):
        texts_of(f"/dev/fd/{10**20}")


def test_parquet_comes_through_a_pipe(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": TEXTS}), buffer)
    reading, writing = os.pipe()
    os.write(writing, buffer.getvalue())
    os.close(writing)
    assert texts_of(f"/dev/fd/{reading}") == TEXTS
    os.close(reading)


def test_the_file_that_was_opened_stays_the_input(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", b"alpha beta\ngamma\n")
    with opened(str(file)) as source:
        write(tmp_path, "b.txt", b"another\n").rename(file)
        assert [line.text for line in read_texts(source, "text")] == TEXTS
        assert source.kind is Kind.TEXT


def test_objects_are_numbered_by_their_lines(tmp_path: Path) -> None:
    with opened(str(write(tmp_path, "a.jsonl", b'{"a": 1}\n\n{"b": 2}\n'))) as source:
        assert list(read_objects(source)) == [(1, {"a": 1}), (3, {"b": 2})]
    with (
        opened(str(write(tmp_path, "b.jsonl", b'{"a": 1}\n5\n'))) as source,
        pytest.raises(InputFileError, match="line 2: expected a JSON object"),
    ):
        list(read_objects(source))
