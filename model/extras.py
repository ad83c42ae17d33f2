"""The packages that only some options need, and how to install them here.

The project itself is on no package index, so that its extras cannot be named in a command.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import sys


def how_to_install(extra: str) -> str:
    """The command that adds what an extra stands for to the environment that runs."""
    pattern = re.compile(rf"([^;]+); extra == \"{extra}\"")
    needed = importlib.metadata.requires("nv-embed-server") or []
    packages = [found[1].strip() for line in needed if (found := pattern.fullmatch(line))]
    assert packages, extra
    if importlib.util.find_spec("pip") is None:  # a container image
        return f"this environment has no pip; build it with {shlex.join(packages)}"
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])
