"""What README prints works as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from server import cli
from tests.server.processes import ServerProcess

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.process
def test_the_example_in_python(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    server = ServerProcess(None, log=tmp_path / "log").wait_ready()
    try:
        program = snippet.replace("http://127.0.0.1:8000", server.url)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
        )
    finally:
        assert server.stop() == 0
    assert done.stderr == ""
    expected = re.findall(r"print\(.*\)  # (.*)", snippet)
    assert done.stdout.splitlines() == expected
    # Its client is not among what `make serve` installs.
    assert "`.venv/bin/pip install openai`" in README.split("```python")[0]


def test_every_option_that_is_named_exists() -> None:
    known = {"--profile"}  # docker's
    parser = cli._parser()
    commands = [dict(a.choices) for a in parser._actions if isinstance(a.choices, dict)]
    for part in (parser, *commands[0].values()):
        known |= set(part._option_string_actions)
    # Benchmarks have options of their own; their commands stand in tables with these words.
    text = re.sub(r"`[^`]*(--threads 1|--true-size|--against|python -m)[^`]*`", "", README)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= known, named - known


def test_keys_are_shown_in_a_file() -> None:
    """A key in a command can be read in `ps` by everybody on the machine."""
    assert not re.search(r"--api-key [A-Z<]", README)
    assert "--api-key-file keys.txt" in README
