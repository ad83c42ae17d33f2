"""Each example in an environment of its own, made anew, that holds what the page says to install.

Releases are those of constraints.txt. The stores are real: Postgres with pgvector comes with the
package pgserver, in an environment of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.examples.cases import CASES, EXAMPLES, packages_of
from tests.server.processes import ROOT, ServerProcess

ENVIRONMENTS = Path(os.environ.get("EXAMPLE_ENVIRONMENTS", "")).resolve()
CONSTRAINTS = Path(__file__).with_name("constraints.txt")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess(None, log=tmp_path_factory.mktemp("server") / "log").wait_ready()
    yield server
    assert server.stop() == 0


def environment(name: str, *packages: str) -> Path:
    """The Python of a new environment with these packages."""
    folder = ENVIRONMENTS / name
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    if packages:
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        install += ["--disable-pip-version-check", "-c", str(CONSTRAINTS), *packages]
        subprocess.run(install, check=True, timeout=900)
    return python


@contextmanager
def postgres() -> Iterator[str]:
    """Its address. Not in a folder of the test's: Postgres runs as another user than root."""
    python = environment("postgres", "pgserver")
    folder = tempfile.mkdtemp(prefix="nv-embed-postgres-")
    command = [str(python), str(Path(__file__).with_name("postgres.py")), folder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("postgresql://"), address
            yield address
        finally:
            process.stdin.close()
            process.wait(60)
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", CASES)
def test_an_example_in_a_clean_environment(
    name: str, server: ServerProcess, tmp_path: Path
) -> None:
    case = CASES[name]
    shutil.copytree(EXAMPLES / "texts", tmp_path / "texts")
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in case.arguments]
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    if name.endswith(".sh"):  # they run the project's own command
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        assert not packages_of(name)
        command = [str(EXAMPLES / name), *arguments]
    else:
        command = [str(environment(name, *packages_of(name))), str(EXAMPLES / name), *arguments]
        variables["OPENAI_BASE_URL"] = f"{server.url}/v1"
    if name == "pgvector_store.py":
        with postgres() as address:
            lines = run(command, variables | {"DATABASE_URL": address})
    else:
        lines = run(command, variables)
    case.check(lines, tmp_path)


def run(command: list[str], variables: dict[str, str]) -> list[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
