"""Inputs that change, fail or hold back something while they are read, and how they are named."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from server.errors import SettingsError
from server.offline import call, inputs
from server.offline.kinds import Kind
from server.offline.places import InputFileError, Line, place_of
from server.offline.slices import plan
from server.offline.sources import ChangedError, Source
from server.offline.stores import shown
from server.offline.text_files import read_texts

LINES = "".join(f"line {number:06} with some more words\n" for number in range(20_000)).encode()
URL = "memory:///changing/in.txt"


@pytest.fixture
def store() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    files.pipe_file("/changing/in.txt", LINES)
    yield files
    if files.exists("/changing"):
        files.rm("/changing", recursive=True)


def rows_of(source: Source, then: Callable[[], object], *, after: int = 0) -> int:
    """How many rows all spans have; `then` is done after so many."""
    count = 0
    for which in plan([source], 256):
        for span in which.spans:
            for _ in read_texts(source, "text", place_of(source, span.begin, span.end)):
                if count == after:
                    then()
                count += 1
    return count


def test_an_input_that_stays_is_read_whole(store: Any, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(LINES)
    for name in (URL, f"file://{tmp_path}/in.txt"):
        with inputs.opened([name]) as found:
            assert rows_of(found[0], lambda: None) == 20_000


@pytest.mark.parametrize("size", [0, 100, -1])
def test_parquet_behind_a_url_that_shrinks_ends_the_run(store: Any, size: int) -> None:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": LINES.decode().split("\n")[:-1]}), buffer)
    raw = buffer.getvalue()
    store.pipe_file("/changing/in.parquet", raw)

    def shrink() -> None:
        store.pipe_file("/changing/in.parquet", raw[:size])

    with inputs.opened(["memory:///changing/in.parquet"]) as found:
        assert rows_of(found[0], lambda: None) == 20_000
        with pytest.raises((ChangedError, InputFileError), match=r"in\.parquet"):
            rows_of(found[0], shrink)


@pytest.mark.parametrize("size", [0, len(LINES) // 2, len(LINES) - 1])
@pytest.mark.parametrize("after", [0, 9_000])
def test_an_input_behind_a_url_that_shrinks_ends_the_run(
    store: Any, tmp_path: Path, size: int, after: int
) -> None:
    file = tmp_path / "in.txt"
    file.write_bytes(LINES)
    shrinking = {
        URL: lambda: store.pipe_file("/changing/in.txt", LINES[:size]),
        f"file://{file}": lambda: os.truncate(file, size),
    }
    for name, shrink in shrinking.items():
        with inputs.opened([name]) as found, pytest.raises(ChangedError, match=r"in\.txt"):
            rows_of(found[0], shrink, after=after)


def test_an_end_before_the_span_ends_is_no_end(tmp_path: Path) -> None:
    """Of a source that says nothing itself."""
    file = tmp_path / "in.txt"
    file.write_bytes(LINES[: len(LINES) // 2])
    for end in (None, len(LINES)):
        source = Source("x", Kind.TEXT, len(LINES), None, lambda: file.open("rb"))
        with pytest.raises(ChangedError, match="x became shorter while it was read"):
            list(read_texts(source, "text", place_of(source, 0, end)))
        source.end()


def test_another_file_of_the_same_size_ends_the_run(store: Any) -> None:
    def replace() -> None:
        store.rm_file("/changing/in.txt")
        store.pipe_file("/changing/in.txt", LINES.replace(b"words", b"birds"))

    with inputs.opened([URL]) as found:
        assert found[0].size == len(LINES)
        replace()  # before its first reading
        with pytest.raises(ChangedError, match="changed while it was read"):
            rows_of(found[0], lambda: None)
    with inputs.opened([URL]) as found, pytest.raises(ChangedError):
        rows_of(found[0], replace, after=19_990)
    with inputs.opened([URL]) as found, pytest.raises(ChangedError, match="went away"):
        rows_of(found[0], lambda: store.rm_file("/changing/in.txt"))


def test_a_store_that_fails_is_named_with_the_way_on(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, path: str, **more: Any) -> bytes:
        raise RuntimeError("503, url='https://user:pass@host/in.txt?X-Sig=secret'")

    monkeypatch.setattr(type(store), "cat_file", failing)
    with inputs.opened([URL]) as found, pytest.raises(InputFileError) as caught:
        rows_of(found[0], lambda: None)
    said = str(caught.value)
    assert said.startswith(f"{URL} cannot be read: 503, url='https://host/in.txt'; ")
    assert "--resume" in said


def test_a_store_that_sends_more_than_asked_is_refused(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(store), "cat_file", lambda self, path, **more: LINES)
    with inputs.opened([URL]) as found, pytest.raises(InputFileError, match="no parts of a file"):
        rows_of(found[0], lambda: None)


def test_a_store_that_gives_no_size_is_refused(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(store), "info", lambda self, path: {"type": "file", "size": None})
    with (
        pytest.raises(SettingsError, match=r"in\.txt: the store does not say its size"),
        inputs.opened([URL]),
    ):
        pass


@pytest.mark.parametrize("second", ["-", "/dev/stdin", "/dev/fd/0"])
def test_standard_input_is_named_once(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        with (
            pytest.raises(SettingsError, match="is read once"),
            inputs.opened(["-", second]),
        ):
            pass
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(reading)


def test_a_local_file_by_its_url_keeps_its_permissions(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_bytes(b"a\n")
    file.chmod(0o600)
    for name in (str(file), f"file://{file}", f"file://{tmp_path}"):
        with inputs.opened([name]) as found:
            assert call.mode_of(found) == 0o600


def test_a_folder_by_url_is_read_as_one_by_path(store: Any) -> None:
    for name in (".hidden.txt", ".folder/a.txt", "below/b.txt"):
        store.pipe_file(f"/changing/{name}", b"a\n")
    with inputs.opened(["memory://changing"]) as found:
        assert [one.name for one in found] == ["memory:///changing/below/b.txt", URL]
    store.pipe_file("/changing/empty/.a.txt", b"a\n")
    with (
        pytest.raises(SettingsError, match="memory://changing/empty holds no text"),
        inputs.opened(["memory://changing/empty"]),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://host/a.jsonl?X-Amz-Signature=1&b=2", "https://host/a.jsonl"),
        ("https://host/my file.jsonl?sig", "https://host/my file.jsonl"),
        ("https://user:p@ss@host/a.jsonl", "https://host/a.jsonl"),
        ("https://token@host/a", "https://host/a"),
        ("sftp://user:pass@host/a", "sftp://host/a"),
        ("s3://bucket/a.jsonl?versionId=7", "s3://bucket/a.jsonl"),
        ("s3://bucket/part-?.jsonl", "s3://bucket/part-?.jsonl"),
        ("abfs://box@account/a.jsonl", "abfs://box@account/a.jsonl"),
        ("403, url='https://h/a?k=v', in x?", "403, url='https://h/a', in x?"),
    ],
)
def test_what_gives_access_is_not_shown(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_names_of_inputs_hold_no_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a signed URL, whose suffix is that before its query."""

    class Web:
        fails = False

        def isdir(self, path: str) -> bool:
            raise AssertionError("would fetch it whole")

        def info(self, path: str) -> dict[str, Any]:
            assert path.endswith("?sig=secret")
            if self.fails:  # as fsspec has it
                raise FileNotFoundError(path) from RuntimeError(f"503, url={path}")
            return {"size": 5, "ETag": "1"}

        def unstrip_protocol(self, path: str) -> str:
            return path

        def invalidate_cache(self, path: str) -> None:
            pass

        def cat_file(self, path: str, start: int, end: int) -> bytes:
            assert path.endswith("?sig=secret")
            return b'"ab"\n'[start:end]

    monkeypatch.setattr(inputs, "store_of", lambda url, scheme: (Web(), url))
    with inputs.opened(["https://me:word@host/in.jsonl?sig=secret"]) as found:
        assert found[0].name == "https://host/in.jsonl"
        rows = list(read_texts(found[0], "text"))
        assert [row.text for row in rows if isinstance(row, Line)] == ["ab"]
        Web.fails = True
        with pytest.raises(InputFileError, match=r"read: 503, url=https://host/in\.jsonl; when"):
            list(read_texts(found[0], "text"))
    with (
        pytest.raises(SettingsError, match=r"cannot be read: 503, url=https://host/in\.jsonl$"),
        inputs.opened(["https://me:word@host/in.jsonl?sig=secret"]),
    ):
        pass
