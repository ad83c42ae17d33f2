"""What the container image must be, judged from what Podman, the probe inside and both servers say.

Nothing here runs a program: what is judged is passed in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE_LIMIT_BYTES = 2_000_000_000
TOLERANCE = 1e-6
"""Of each number of a vector whose length is 1, in float32; 0 and 8e-8 were seen."""
MAY_WRITE = {"/cache", "/tmp"}
GPU_PACKAGE = re.compile(r"nvidia-|cuda-|triton$")
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the table."""

    name: str
    figure: str
    right: bool


def of_image(inspected: Facts) -> Iterator[Point]:
    """inspected: what `podman image inspect` says of it."""
    size, config = inspected["Size"], inspected["Config"]
    yield Point(
        "size",
        f"{size / 1e9:.2f} GB of at most {SIZE_LIMIT_BYTES / 1e9:.0f}",
        size <= SIZE_LIMIT_BYTES,
    )
    user = config.get("User", "")
    yield Point("its user, by number", user or "root", bool(re.fullmatch(r"[1-9]\d*:\d+", user)))
    check = inspected.get("HealthCheck") or inspected.get("Healthcheck") or {}
    command = " ".join(check.get("Test", ()))
    yield Point("its health check", command or "none", "healthcheck.py" in command)


def of_inside(seen: Facts, locked: dict[str, str]) -> Iterator[Point]:
    """seen: by image_probe.py. locked: versions by name, without this project's own."""
    processes = seen["processes"]
    users = {uid for one in processes for uid in one["Uid"].split()}
    yield Point(
        "users of its processes", f"{' '.join(sorted(users))} ({len(processes)})", "0" not in users
    )
    held = {one[name] for one in processes for name in CAPABILITIES}
    yield Point("capabilities", " ".join(sorted(held)), {int(mask, 16) for mask in held} == {0})
    bound = all(one["NoNewPrivs"] == "1" for one in processes)
    yield Point("no new privileges", "set" if bound else "not set", bound)
    read_only = seen["read_only"]
    yield Point("root file system", "read-only" if read_only else "writable", read_only)
    writable = seen["writable"]
    yield Point("what can be written", _some(writable), set(writable) == MAY_WRITE)
    yield Point("compilers", _some(seen["compilers"]), not seen["compilers"])
    versions = {_normal(name): version for name, version in seen["packages"].items()}
    versions.pop("nv-embed-server", None)
    gpu = sorted(name for name in versions if GPU_PACKAGE.match(name))
    yield Point("packages for GPUs", _some(gpu), not gpu)
    public = {name: version.split("+")[0] for name, version in versions.items()}
    wanted = {_normal(name): version for name, version in locked.items()}
    differing = sorted({name for name, _ in public.items() ^ wanted.items()})
    yield Point(
        "packages unlike the lock file", f"{_some(differing)} of {len(public)}", not differing
    )


def of_vectors(inside: list[list[float]], outside: list[list[float]]) -> Point:
    """The same texts by the image's server and by one outside of it."""
    name, one, other = "vectors as outside of it", np.array(inside), np.array(outside)
    if one.shape != other.shape or one.ndim != 2:
        return Point(name, f"shapes {one.shape} and {other.shape}", False)
    largest = float(np.abs(one - other).max())
    figure = f"{one.shape[0]} of {one.shape[1]} numbers, largest difference {largest:.1e}"
    return Point(name, figure, largest <= TOLERANCE)


def locked_versions(text: str) -> dict[str, str]:
    """Versions by name, of a lock file's text."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def table(points: list[Point]) -> str:
    """One point a line; those that are wrong are marked."""
    width = max(len(point.name) for point in points)
    return "\n".join(
        f"{'ok   ' if point.right else 'WRONG'}  {point.name:<{width}}  {point.figure}"
        for point in points
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _some(found: list[str]) -> str:
    return f"{' '.join(found[:4])}{' …' if len(found) > 4 else ''}" if found else "none"
