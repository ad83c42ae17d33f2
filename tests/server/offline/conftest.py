"""`nv-embed encode` as a command, with a runner whose vectors can be checked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from server import cli

Encode = Callable[..., int]


@pytest.fixture
def encode(golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encode:
    """Runs the command in `tmp_path`, with vectors that hash their text."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, runner: str = "tests.server.runners:Hashing") -> int:
        options = ["--model", str(golden_checkpoint), "--runner", runner]
        if "--devices" not in arguments:
            options += ["--device", "cpu"]
        status = cli.main(["encode", *map(str, arguments), *options])
        for handler in logging.getLogger().handlers:
            handler.flush()  # a thread writes the log
        return status

    return run
