"""What a command raises, as its user sees it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model import console
from model.errors import UnsupportedError

ROOT = Path(__file__).parents[2]


class WrongCallError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UnsupportedError("not\nhere"), 2, "x: not here\n"),
        (WrongCallError("no such option"), 2, "x: no such option\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 1, "x: No space left on device\n"),
        (OSError(errno.EACCES, "Permission denied", "a.npy"), 1, "x: a.npy: Permission denied\n"),
        (OSError("AF_UNIX path too long"), 1, "x: AF_UNIX path too long\n"),
        (MemoryError(), 1, "x: out of memory\n"),
        (RecursionError("too deep"), 1, "x: an unforeseen RecursionError: too deep (log level"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_every_error_has_a_line_and_a_status(
    error: BaseException,
    status: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console, "_forget_stdout", lambda: None)  # it is the test's own

    def command() -> int:
        raise error

    assert console.run("x", command, (WrongCallError,)) == status
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == (1 if line else 0)


@pytest.mark.parametrize("error", [WrongCallError("no"), OSError("no"), RuntimeError("no")])
def test_a_full_stderr_does_not_hide_the_status(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_forget_stdout", lambda: None)

    def command() -> int:
        raise error

    for mode in (0, -1):  # without a buffer, and with one
        with open("/dev/full", "w", buffering=1 if mode else -1) as full:
            monkeypatch.setattr(sys, "stderr", full)
            expected = 2 if isinstance(error, WrongCallError) else 1
            assert console.run("x", command, (WrongCallError,)) == expected
            with contextlib.suppress(OSError):
                full.close()


def test_no_error_is_the_commands_own_status() -> None:
    assert console.run("x", lambda: None) == 0
    assert console.run("x", lambda: 3) == 3


def test_the_traceback_is_there_for_who_asks(caplog: pytest.LogCaptureFixture) -> None:
    def command() -> int:
        raise LookupError("lost")

    with caplog.at_level(logging.DEBUG, "nv_embed"):
        assert console.run("x", command) == 1
    assert "LookupError: lost" in caplog.text
    assert "in command" in caplog.text


@pytest.mark.process
@pytest.mark.parametrize(
    "words",
    [
        ["decontamination", "/nothing", "/none"],
        ["teacher", "/none", "OUT"],
    ],
)
def test_the_modules_of_training_end_so_too(words: list[str], tmp_path: Path) -> None:
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    ended = subprocess.run(
        [sys.executable, "-m", f"model.training.{words[0]}", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode in (1, 2)
    assert ended.stderr.startswith(f"{words[0]}: /none")
    assert ended.stderr.count("\n") == 1
