"""`make lock-ray`: what the extra `ray` adds to requirements.lock, all of it pinned.

Versions of what requirements-test.lock holds, too, are that one's: run it after `make lock`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--dry-run", "--ignore-installed", "--report", "-", "-c", "requirements-test.lock"]
    command += project["optional-dependencies"]["ray"]
    said = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    there = {canonicalize_name(line.partition("==")[0]) for line in lines}
    found = [one["metadata"] for one in json.loads(said)["install"]]
    pinned = sorted(
        (
            f"{one['name']}=={one['version']}"
            for one in found
            if canonicalize_name(one["name"]) not in there
        ),
        key=str.lower,
    )
    (ROOT / "requirements-ray.lock").write_text("\n".join(pinned) + "\n")
    print(f"{len(pinned)} packages")


if __name__ == "__main__":
    main()
