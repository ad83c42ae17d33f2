"""Setting up with the wrong Python: what `make` says, and that the mistake does not stay."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]


def script(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The Makefile with Pythons that only say what they are asked for."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    # An old one: its version is asked for by `-c` and by `--version`.
    script(
        tmp_path / "python3.10", 'case "$1" in --version) echo Python 3.10.13;; *) exit 1;; esac'
    )
    # A new one makes a .venv whose pip writes down what it is to install.
    script(
        tmp_path / "python3.12",
        f"""case "$2" in
        venv) for last; do :; done; rm -rf "$last"; mkdir -p "$last/bin"
            ln -s {sys.executable} "$last/bin/python"
            printf '#!/bin/sh\\necho "$@" >> calls\\n' > "$last/bin/pip"; chmod +x "$last/bin/pip";;
        *) exit 0;; esac""",
    )
    script(  # Debian without python3-venv: leaves an environment without pip, and fails
        tmp_path / "python3-bare",
        f"""case "$2" in
        venv) for last; do :; done; mkdir -p "$last/bin"
            ln -sf {sys.executable} "$last/bin/python"; exit 1;;
        *) exit 0;; esac""",
    )
    return tmp_path


def make(project: Path, python: str, goal: str = "install") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", goal, f"PYTHON={project / python}"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_old_python_is_refused_before_anything_is_made(project: Path) -> None:
    made = make(project, "python3.10")
    assert made.returncode == 2
    assert "This needs Python 3.11 or later, and " in made.stdout
    assert "is Python 3.10.13." in made.stdout
    assert "make install PYTHON=python3.12" in made.stdout
    assert not (project / ".venv").exists()
    made = make(project, "python3.12")  # mended: nothing else is needed
    assert made.returncode == 0, made.stderr
    assert "-r requirements.lock" in (project / "calls").read_text()
    assert (project / ".venv/.installed").exists()


def test_a_python_that_is_not_there_is_said(project: Path) -> None:
    made = make(project, "python9")
    assert made.returncode == 2
    assert "This needs Python 3.11 or later" in made.stdout
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("broken", ["old", "gone"])
def test_a_venv_of_a_wrong_python_is_made_anew(project: Path, broken: str) -> None:
    if broken == "old":
        script(project / ".venv/bin/python", "exit 1")
    else:  # the system's Python was replaced
        (project / ".venv/bin").mkdir(parents=True)
        (project / ".venv/bin/python").symlink_to("/usr/bin/python3.0")
    script(project / ".venv/bin/pip", "exit 1")
    (project / ".venv/.installed").touch()  # all was well, once
    made = make(project, "python3.10")
    assert made.returncode == 2  # not by another wrong one
    assert "This needs Python 3.11 or later" in made.stdout
    made = make(project, "python3.12")
    assert made.returncode == 0, made.stderr
    assert ".venv has no Python 3.11 or later: making it anew" in made.stdout
    assert "-r requirements.lock" in (project / "calls").read_text()
    (project / "calls").unlink()
    made = make(project, "python3.10")  # whole: PYTHON is not asked any more
    assert made.returncode == 0
    assert not (project / "calls").exists()


def test_a_half_made_venv_is_finished(project: Path) -> None:
    made = make(project, "python3-bare")
    assert made.returncode == 2
    assert "cannot make a virtual environment; Debian: apt-get install python3-venv" in made.stdout
    made = make(project, "python3.12")
    assert made.returncode == 0, made.stderr
    assert (project / ".venv/.installed").exists()
