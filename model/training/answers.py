"""Answers of a chat model on disk, one JSON line each as soon as it came, behind a line that says
what was asked for.

A process that is killed loses at most the line that it was writing. Knows not what answers mean.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from model import user_files
from model.training.chat import Answer
from model.training.examples import DataError

_MARK = b'{"nv-embed synthesize": 1, '
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC


class Answers:
    """id -> Answer, all on disk. May be added to by several threads at a time."""

    def __init__(self, path: Path, file: FileIO, known: dict[str, Answer]) -> None:
        self._path, self._file, self._known = path, file, known
        self._lock = threading.Lock()

    @property
    def known(self) -> Mapping[str, Answer]:
        return self._known

    def add(self, name: str, answer: Answer) -> None:
        """Raises OSError, after which the file is as it was."""
        line = json.dumps({"id": name, **asdict(answer)}).encode() + b"\n"
        with self._lock:
            try:
                _append(self._file, line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            self._known[name] = answer


@contextmanager
def opened(path: Path, settings: Mapping[str, Any]) -> Iterator[Answers]:
    """The answers that `path` has for these settings; a new file where there is none.

    A last line that was cut off is removed. A file without an answer is begun anew. Raises
    DataError for the answers of other settings, naming what differs, and for what is no such file;
    OSError.
    """
    header = _MARK + json.dumps(settings).encode()[1:] + b"\n"
    descriptor = os.open(path, _FLAGS, user_files.mode_like(None))
    with FileIO(descriptor, "a+") as file:
        file.seek(0)
        raw = file.readall() or b""
        if not (raw.startswith(_MARK) or _MARK.startswith(raw)):
            raise DataError(f"{path} is not of this command: move it, or name another output")
        first, *lines = raw.split(b"\n")[:-1] or [b""]
        if lines:
            file.truncate(raw.rfind(b"\n") + 1)
            _compare(path, json.loads(json.dumps(settings)), first)
        else:
            file.truncate(0)
            _append(file, header)
            _keep_name(path)
        known = dict(_read(path, lines))
        yield Answers(path, file, known)


def _compare(path: Path, now: dict[str, Any], header: bytes) -> None:
    try:
        then = json.loads(header)
    except ValueError:
        raise DataError(f"{path}, line 1: damaged: move the file away") from None
    if changed := [
        f"{name}: {then.get(name)!r} there, {value!r} now"
        for name, value in now.items()
        if then.get(name) != value
    ]:
        raise DataError(
            f"{path} holds the answers of other settings ({'; '.join(changed)}): set them back, "
            "or name another output"
        )


def _read(path: Path, lines: list[bytes]) -> Iterator[tuple[str, Answer]]:
    for number, line in enumerate(lines, 2):
        try:
            row = json.loads(line)
            name, answer = row.pop("id"), Answer(**row)
            if not all(isinstance(value, str) for value in (name, answer.text, answer.finish)):
                raise TypeError
            yield name, answer
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise DataError(
                f"{path}, line {number}: not an answer: remove the line, and it is asked again"
            ) from None


def _append(file: FileIO, line: bytes) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]
        os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            file.truncate(size)  # another thread's line must not begin inside this one
        raise


def _keep_name(path: Path) -> None:
    """A new file's name is kept with its folder."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some file systems cannot
            os.fsync(folder)
    finally:
        os.close(folder)
