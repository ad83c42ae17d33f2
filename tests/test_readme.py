"""What README and docs/ print works as it is printed."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.cli import command_line
from tests.server.processes import ROOT, ServerProcess

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(None, log=tmp_path_factory.mktemp("server") / "log").wait_ready()
    yield server
    assert server.stop() == 0


def test_there_are_examples_and_they_are_all_in_readme() -> None:
    assert len(SNIPPETS) == 2
    assert not [page for page in PAGES[1:] if "```python" in page.read_text()]


@pytest.mark.process
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split()[1])
def test_an_example_in_python(server: ServerProcess, snippet: str) -> None:
    package = snippet.split()[1]
    if importlib.util.find_spec(package) is None:  # the locked test packages have both
        pytest.skip(f"{package} is not installed")
    program = snippet.replace("http://127.0.0.1:8000", server.url)
    assert program != snippet
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    expected = re.findall(r"print\(.*\)  # (.*)", snippet)
    assert expected
    assert done.stdout.splitlines() == expected
    # Its client is not among what `make serve` installs.
    install = f"`.venv/bin/pip install {package.replace('_', '-')}`"
    assert install in README[: README.index(snippet)]


@pytest.mark.process
@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_the_example_with_curl(server: ServerProcess) -> None:
    (command,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    command = command.replace("http://127.0.0.1:8000", server.url).replace("curl", "curl -s")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    answer = json.loads(done.stdout)
    asked = json.loads(command.split("-d '")[1].rstrip().removesuffix("'"))
    assert answer["data"][0]["embedding"] == server.vectors(**asked)[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_option_that_is_named_exists(page: Path) -> None:
    known = {"--profile", "--gpus", "--system-site-packages", "--set"}  # docker's, venv's, Helm's
    parser = command_line.parser()
    commands = [dict(a.choices) for a in parser._actions if isinstance(a.choices, dict)]
    for part in (parser, *commands[0].values()):
        known |= set(part._option_string_actions)
    # Benchmarks have options of their own; their commands stand in tables with these words.
    ours = r"`[^`]*(--threads 1|--true-size|--against|python -m)[^`]*`"
    text = re.sub(ours, "", page.read_text())
    text = re.sub(r"pip install [^`\n]*|pytest [^`\n]*", "", text)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= known, named - known


def test_keys_are_shown_in_a_file() -> None:
    """A key in a command can be read in `ps` by everybody on the machine."""
    for page in PAGES:
        assert not re.search(r"--api-key [A-Z<]", page.read_text()), page
    assert "--api-key-file keys.txt" in README
