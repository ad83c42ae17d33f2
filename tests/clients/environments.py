"""Where the clients are installed (`make test-clients` does it), and how an environment is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "clients"
HERE = Path(__file__).parent
CLIENT_S = 120
"""A client that has not ended its tries by then is killed."""


def command(module: str) -> list[str]:
    if module == "node":  # an import is looked for beside the file that has it
        for file in (HERE / "node").glob("*.mjs"):
            shutil.copy(file, BUILD / "node")
        return ["node", str(BUILD / "node" / "harness.mjs")]
    python = sys.executable if module == "borrowed" else str(python_of(module))
    return [python, "-m", "tests.clients.adapters.harness"]


def python_of(module: str) -> Path:
    return BUILD / module / "bin" / "python"


def environment(module: str) -> dict[str, str]:
    """Nothing of this machine's user: no keys, no other URLs, no hub."""
    kept = ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")
    paths = [str(ROOT), *([str(BUILD / "borrowed")] if module == "borrowed" else [])]
    home = BUILD / "home"
    home.mkdir(parents=True, exist_ok=True)
    return {
        **{name: os.environ[name] for name in kept if name in os.environ},
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(paths),
        # Offline, Hugging Face's own client refuses every URL.
        **({} if module == "sdks" else {"HF_HUB_OFFLINE": "1"}),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "ANONYMIZED_TELEMETRY": "False",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "MEM0_TELEMETRY": "False",
        "DO_NOT_TRACK": "1",
        "TIKTOKEN_CACHE_DIR": str(ranks()),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def ranks() -> Path:
    """cl100k's, as LiteLLM brings them under the name of tiktoken's cache: no download."""
    found = BUILD.glob("litellm/lib/python3*/site-packages/litellm/litellm_core_utils/tokenizers")
    return next(found, BUILD / "no-ranks")


def results(module: str, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each client of the job showed, as it comes. One that kills the process, or does not end
    in time, is one that failed: those after it run in a new process."""
    waiting = list(job["clients"])
    while waiting:
        with (BUILD / f"{module}.log").open("a") as log:
            process = subprocess.Popen(
                command(module),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(module),
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )
        assert process.stdin is not None
        with process.stdin as stdin:
            json.dump({**job, "clients": waiting, "module": module}, stdin)
        try:
            for line in lines(process):
                yield json.loads(line)
                waiting.pop(0)
        finally:
            end(process)
        if waiting:
            gone = waiting.pop(0)
            why = f"its process ended ({process.returncode}); see build/clients/{module}.log"
            yield {"name": gone["name"], "version": "-", "passages": {"error": why}, "seconds": 0}


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """What it prints, for as long as each line comes in time."""
    assert process.stdout is not None
    while True:
        timer = threading.Timer(CLIENT_S, end, (process,))
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            process.wait()
            return
        yield line


def end(process: subprocess.Popen[str]) -> None:
    """It, and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
