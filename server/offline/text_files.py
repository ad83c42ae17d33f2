"""Reading bulk inputs, a row at a time: text, JSON lines, Parquet.

Owns which kind of file an input is, how it is opened, and every refusal of a row, by its number.
Knows nothing of models or outputs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from model.errors import FileError
from model.extras import how_to_install
from model.user_files import HEAD_BYTES, UTF8_MARK, check_encoding, kind_of, open_regular
from server.api import json_text

MAX_LINE_BYTES = 64 << 20
"""A longer line is refused: a row is held several times over while it is read and tokenized."""
_SNIFFED_BYTES = 1 << 20
"""How long a first line may be for its content to tell the kind of file."""


class Kind(StrEnum):
    """What an input file holds."""

    TEXT = "text"
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"


_SUFFIXES = {
    **dict.fromkeys(("", ".txt", ".text", ".md", ".log"), Kind.TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".jl", ".json"), Kind.JSON_LINES),
    **dict.fromkeys((".parquet", ".pq"), Kind.PARQUET),
}
_PARQUET_MAGIC = b"PAR1"
_FOREIGN = (
    (b"\x1f\x8b", "compressed with gzip: unpack it first (gunzip -k FILE)"),
    (b"BZh", "compressed with bzip2: unpack it first (bunzip2 -k FILE)"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first (unxz -k FILE)"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first (unzstd FILE)"),
    (b"PK\x03\x04", "a zip archive or an Office file, not text"),
    (b"ARROW1", "an Arrow file: write it as Parquet"),
    (b"\x93NUMPY", "a NumPy file, not text"),
    (b"%PDF-", "a PDF, not text"),
)
_STREAMS = re.compile(r"-|/dev/stdin|/dev/fd/(\d{1,9})|/proc/self/fd/(\d{1,9})")


class InputFileError(Exception):
    """A row of the input cannot be used; the message holds its number."""


class Line(NamedTuple):
    """One text, and the number of its line (or of its row in Parquet)."""

    number: int
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """An input that is open and can be read again from its beginning, one reading at a time.

    It stays the file that was opened, whatever takes its name later.
    """

    name: str  # as the user wrote it
    kind: Kind
    named: os.stat_result  # of what the name or the redirection stands for: a file or a pipe
    file: BinaryIO

    def at(self, number: int) -> str:
        """The name of a row in messages."""
        return f"{self.name}, {'row' if self.kind is Kind.PARQUET else 'line'} {number}"

    def sha256(self) -> str:
        self.file.seek(0)
        return hashlib.file_digest(self.file, "sha256").hexdigest()  # type: ignore[arg-type]


def is_stream(name: str) -> bool:
    """Whether this is standard input or another pipe of the shell's, such as <(…)."""
    return name == "-" or (_STREAMS.fullmatch(name) is not None and not Path(name).is_file())


@contextmanager
def opened(name: str) -> Iterator[Source]:
    """The input called `name`; a stream is first copied to an unnamed temporary file.

    Raises FileError, InputFileError or OSError.
    """
    with ExitStack() as stack:
        if is_stream(name):
            copy, named = _copy_of_stream(name)
            file = stack.enter_context(copy)
        else:
            file = stack.enter_context(open_regular(Path(name)))
            named = os.fstat(file.fileno())
        yield Source(name, _kind(name, is_stream(name), file), named, file)


def _copy_of_stream(name: str) -> tuple[BinaryIO, os.stat_result]:
    match = _STREAMS.fullmatch(name)
    assert match is not None, name
    number = int(match[1] or match[2] or 0)
    named = os.fstat(number)
    mode = named.st_mode
    if os.isatty(number):
        raise FileError(f"{name} is a terminal: send a file through a pipe, or name one")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise FileError(f"{name} is {kind_of(mode)}, not a file or a pipe")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with os.fdopen(os.dup(number), "rb") as stream:
        shutil.copyfileobj(stream, copy)
    return copy, named


def _kind(name: str, unnamed: bool, file: BinaryIO) -> Kind:
    """By the name and by the content; where these two contradict each other, neither is believed.

    What is unknown is refused: taken for text, other formats give vectors of their syntax.
    """
    file.seek(0)
    head = file.read(HEAD_BYTES)
    suffix = "" if unnamed else Path(name).suffix.lower()
    if head.startswith(_PARQUET_MAGIC):
        return Kind.PARQUET
    for magic, words in _FOREIGN:
        if head.startswith(magic):
            raise FileError(f"{name} is {words}")
    if suffix not in _SUFFIXES:
        raise FileError(
            f"{name}: unknown kind of file {suffix!r}; text is .txt, JSON lines are .jsonl, and "
            "Parquet is .parquet (through a pipe the content tells: nv-embed encode - -o OUT < "
            "FILE)"
        )
    kind = _SUFFIXES[suffix]
    if kind is Kind.PARQUET:
        raise FileError(f"{name} is no Parquet file: it does not begin with PAR1")
    check_encoding(head, name)
    if kind is Kind.TEXT and _begins_with_object(file):
        if not unnamed and suffix:
            raise FileError(
                f"{name} is called text, but its first line is a JSON object: name it .jsonl (to "
                "embed the lines as they stand, make them JSON strings: jq -R . FILE > FILE.jsonl)"
            )
        return Kind.JSON_LINES
    if kind is Kind.TEXT and _ends_lines_in_cr(file):
        raise FileError(f"{name}: its lines end in CR alone: convert it (tr '\\r' '\\n')")
    return kind


def _ends_lines_in_cr(file: BinaryIO) -> bool:
    """As on old Macs: all texts would be one."""
    file.seek(0)
    first = file.readline(_SNIFFED_BYTES)
    return not first.endswith(b"\n") and b"\r" in first.rstrip(b"\r")


def _begins_with_object(file: BinaryIO) -> bool:
    file.seek(0)
    while line := file.readline(_SNIFFED_BYTES):
        if text := line.removeprefix(UTF8_MARK).strip():
            try:
                return text.startswith(b"{") and isinstance(json_text.loads(text), dict)
            except ValueError:
                return False
    return False


def read_texts(source: Source, field: str) -> Iterator[Line]:
    """One text a line; or `field` of each JSON line (or a JSON string); or a Parquet column."""
    if source.kind is Kind.TEXT:
        yield from _text_lines(source)
        return
    if source.kind is Kind.PARQUET:
        values: Iterator[tuple[int, Any]] = _parquet_column(source, field)
    else:
        values = _field_of_lines(source, field)
    for number, text in values:
        if not isinstance(text, str):
            raise InputFileError(
                f"{source.at(number)}: expected a string"
                + ("" if source.kind is Kind.PARQUET else f" or an object with one in {field!r}")
            )
        if not text:
            raise InputFileError(f"{source.at(number)}: the text is empty")
        if len(text) > MAX_LINE_BYTES:  # of a Parquet file: lines were measured before
            raise _too_long(source, number)
        yield Line(number, text)


def read_objects(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file of JSON lines, numbered."""
    for number, value in _json_values(source):
        if not isinstance(value, dict):
            raise InputFileError(f"{source.at(number)}: expected a JSON object")
        yield number, value


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends and marks: files joined by `cat` have a mark in the middle."""
    source.file.seek(0)
    for number, raw in enumerate(iter(lambda: source.file.readline(MAX_LINE_BYTES), b""), 1):
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raise _too_long(source, number)
        if raw == UTF8_MARK:  # and nothing after it
            return
        yield number, raw.removeprefix(UTF8_MARK).rstrip(b"\r\n")


def _too_long(source: Source, number: int) -> InputFileError:
    return InputFileError(
        f"{source.at(number)}: longer than {MAX_LINE_BYTES >> 20} MiB: split the text"
    )


def _decoded(source: Source, number: int, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise InputFileError(
            f"{source.at(number)}: not UTF-8: convert the file first "
            "(from Latin-1: iconv -f LATIN1 -t UTF-8)"
        ) from None


def _text_lines(source: Source) -> Iterator[Line]:
    lines = _lines(source)
    for number, raw in lines:
        if not raw:
            last = not any(rest.strip() for _, rest in lines)
            hint = " (a blank line at the end: remove it)" if last else ""
            raise InputFileError(f"{source.at(number)}: the text is empty{hint}")
        yield Line(number, _decoded(source, number, raw))


def _json_values(source: Source) -> Iterator[tuple[int, Any]]:
    """Blank lines are no values and are left out, as other readers do."""
    for number, raw in _lines(source):
        if not raw.strip():
            continue
        text = _decoded(source, number, raw)
        try:
            yield number, json_text.loads(raw)
        except ValueError as error:
            if text.lstrip().startswith("[") and number == 1:
                raise InputFileError(
                    f"{source.at(number)}: a JSON array over several lines; a value a line is "
                    "needed (jq -c '.[]' FILE > FILE.jsonl)"
                ) from None
            why = re.sub(r": line \d+ column (\d+) \(char \d+\)", r" at column \1", str(error))
            raise InputFileError(
                f"{source.at(number)}: not a line of JSON ({why[:1].lower()}{why[1:]})"
            ) from None


def _field_of_lines(source: Source, field: str) -> Iterator[tuple[int, Any]]:
    for number, value in _json_values(source):
        if isinstance(value, list) and number == 1:
            raise InputFileError(
                f"{source.at(number)}: a JSON array; a value a line is needed "
                "(jq -c '.[]' FILE > FILE.jsonl)"
            )
        if isinstance(value, dict) and field not in value:
            hint = "--field names it"
            if "custom_id" in value and "body" in value:
                hint = "for OpenAI's batch files: --openai-batch"
            raise InputFileError(f"{source.at(number)}: no field {field!r} ({hint})")
        yield number, value[field] if isinstance(value, dict) else value


def _parquet_column(source: Source, field: str) -> Iterator[tuple[int, Any]]:
    parquet = import_parquet()
    import pyarrow

    source.file.seek(0)
    number = 0
    try:
        file = parquet.ParquetFile(source.file)
        names = file.schema_arrow.names
        if field not in names:
            raise InputFileError(
                f"{source.name} has no column {field!r} (--field names it); it has "
                f"{', '.join(names)}"
            )
        for batch in file.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield number, value
    except (pyarrow.ArrowException, OSError) as error:
        raise InputFileError(f"{source.at(number + 1)}: not to be read: {error}") from None


def import_parquet() -> Any:
    """pyarrow.parquet. Raises InputFileError with how to get it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputFileError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    return pyarrow.parquet
