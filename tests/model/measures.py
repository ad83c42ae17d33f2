"""Measures of gpu-check that do what they should not, for its tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from model.errors import UnsupportedError
from model.verify.bench import Bench


def process(bench: Bench) -> dict[str, Any]:
    return {"pid": os.getpid(), "odd": float("nan")}


def raises(bench: Bench) -> dict[str, Any]:
    raise ValueError("made to fail")


def crashes(bench: Bench) -> dict[str, Any]:
    print("about to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def hangs(bench: Bench) -> dict[str, Any]:
    time.sleep(600)
    return {}


def is_not_to_be_had(bench: Bench) -> dict[str, Any]:
    raise UnsupportedError("not on this machine")


def finds_a_fault(bench: Bench) -> dict[str, Any]:
    return {"checks": [{"name": "a check", "status": "failed", "got": 1}]}


def waits_for_ever(bench: Bench) -> dict[str, Any]:
    """As `hangs`, and leaves its process's id."""
    Path(bench.job["work"], "pid").write_text(str(os.getpid()))
    return hangs(bench)
