"""What messages and documents tell people to install can be installed."""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from model.extras import how_to_install

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SOURCES = [
    *(path for folder in ("model", "server", "docker") for path in (ROOT / folder).rglob("*.*")),
    *ROOT.glob("*.md"),
    *ROOT.glob("*.toml"),
]
TEXTS = {p: p.read_text() for p in SOURCES if p.suffix in (".py", ".md", ".yaml", ".toml", ".sh")}


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_command_installs_what_the_extra_names(extra: str) -> None:
    words = shlex.split(how_to_install(extra))
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    found = {str(Requirement(word)) for word in words[4:]}
    assert found == {str(Requirement(line)) for line in EXTRAS[extra]}


def test_every_extra_that_a_message_names_exists() -> None:
    named = {
        name
        for path, text in TEXTS.items()
        for name in re.findall(r"how_to_install\(['\"]([\w-]+)['\"]\)", text)
    }
    assert {"training", "mteb", "int8", "flash-attn", "parquet"} <= named <= set(EXTRAS)


def test_nobody_is_told_to_install_what_is_on_no_index() -> None:
    """The project's name is free there: somebody else's package could answer to it."""
    told = re.compile(r"pip[\w. ]* (install|download)[^\n]*nv-embed-server|nv-embed-server\[")
    assert not [str(path) for path, text in TEXTS.items() if told.search(text)]


def test_documents_install_extras_from_the_checkout() -> None:
    for path, text in TEXTS.items():
        for extra in re.findall(r"-e '?\.\[([\w-]+)\]", text):
            assert extra in EXTRAS, path
