"""Runs inside a container, by the image's own Python, and prints what it sees as JSON.

Nothing is judged here (image_facts.py), and nothing is imported that the image might lack.
"""

from __future__ import annotations

import json
import os
import re
from importlib import metadata
from pathlib import Path

COMPILER = re.compile(r"(.+-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|tcc|cc1|cc1plus)(-[\d.]+)?")
KERNELS = {"/proc", "/sys", "/dev"}
STATUS = ("Name", "Uid", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")


def main() -> None:
    compilers: list[str] = []
    writable: list[str] = []
    for folder, folders, files in os.walk("/"):
        folders[:] = [one for one in folders if os.path.join(folder, one) not in KERNELS]
        inside = any(folder.startswith(f"{one}/") or one == "/" for one in writable)
        if not inside and os.access(folder, os.W_OK):
            writable.append(folder)
            inside = True
        for path in (os.path.join(folder, name) for name in files):
            if COMPILER.fullmatch(os.path.basename(path)) and os.access(path, os.X_OK):
                compilers.append(path)
            if not inside and not os.path.islink(path) and os.access(path, os.W_OK):
                writable.append(path)
    facts = {
        "compilers": compilers,
        "writable": writable,
        "read_only": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
        "packages": {one.name: one.version for one in metadata.distributions()},
        "processes": list(_processes()),
    }
    print(json.dumps(facts))


def _processes() -> list[dict[str, str]]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = [line.split(":", 1) for line in status.read_text().splitlines()]
        except OSError:  # it has ended
            continue
        found.append({name: value.strip() for name, value in lines if name in STATUS})
    return found


if __name__ == "__main__":
    main()
