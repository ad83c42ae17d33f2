"""`make test-clients` without what it needs says what to install; it never skips."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.environments import ROOT

pytestmark = pytest.mark.process


@pytest.mark.parametrize("missing", ["", "npm", "curl", "node", "new node"])
def test_a_tool_that_is_missing_fails(tmp_path: Path, missing: str) -> None:
    (tmp_path / "sh").symlink_to("/bin/sh")
    for tool in {"npm", "curl", "node"} - {missing}:
        status = int(tool == "node" and missing == "new node")
        (tmp_path / tool).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / tool).chmod(0o755)
    make = shutil.which("make")
    assert make
    done = subprocess.run(
        [make, "client-tools", f"SHELL={tmp_path / 'sh'}"],
        cwd=ROOT,
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = "needs Node 20 or later, npm and curl; Debian: apt-get install nodejs npm curl"
    assert (done.returncode, told in done.stdout) == ((2, True) if missing else (0, False))


def test_the_full_gate_runs_the_gate_and_what_needs_a_network() -> None:
    lines = (ROOT / ".ci" / "full").read_text().splitlines()
    suites = [
        *("test-slow", "test-clients", "test-browser", "test-examples", "image-check"),
        *("test-ray test-ray-encode", "recipe"),
    ]
    assert lines[-8:] == [".ci/run", *(f"make {suite}" for suite in suites)]
    assert (ROOT / ".ci" / "full").stat().st_mode & 0o111
