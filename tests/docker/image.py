"""`make image-check`: the container image, built for the CPU and run by Podman, without Docker.

It is built in storage of its own, which is removed at the end, and run as docker/README.md says:
read-only, without capabilities. Its server is asked, checked and stopped. That a fault would be
found is shown by a container with nothing dropped and a compiler. What this does not show: a GPU,
Docker itself, Compose. Prints a table; ends with status 1 where a point is wrong or a program is
missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.docker import image_facts
from tests.docker.image_facts import Point
from tests.docker.podman import Podman
from tests.server.processes import ServerProcess, free_ports

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/nv-embed-server:check"
BASE = "localhost/base:check"
PROBE = Path(__file__).with_name("image_probe.py")
HARDENED = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
)
# As tests.server.processes starts the server outside.
OPTIONS = {"DTYPE": "float32", "DEVICES": "cpu", "THREADS": "1", "TOKEN_IDS": "model"}
TEXTS = ["A query about trees.", "Bäume, 木, 🌳", "one text that is longer than the others " * 20]
PATIENCE_S = 60.0
GRACE_S = 45
"""Of `podman stop`: as docker/README.md says."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="make image-check", description="Prove the image.")
    parser.add_argument(
        "--base",
        help="an image to build from in place of the Dockerfile's own; debootstrap: one made of "
        "Debian's packages, for where no registry can be reached (as root)",
    )
    parser.add_argument(
        "--build-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="handed to podman build; may be given again: --build-option=--volume=FROM:TO:ro",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave build/image, for a quicker rerun"
    )
    arguments = parser.parse_args()
    tools = ["podman", *(["debootstrap"] if arguments.base == "debootstrap" else [])]
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        print(f"missing: {', '.join(missing)}; Debian: apt-get install {' '.join(missing)}")
        return 1
    podman = Podman(ROOT / "build/image")
    points: list[Point] = []
    try:
        points.extend(_points(podman, arguments.base, arguments.build_option))
    finally:
        if not arguments.keep:
            podman.remove_everything()
        print(image_facts.table(points))
    return 0 if all(point.right for point in points) else 1


def _points(podman: Podman, base: str | None, options: list[str]) -> Iterator[Point]:
    yield _linted()
    before = time.monotonic()
    base = _base(podman, base)
    build = ["--format", "docker"]  # else the health check is dropped
    build += ["--network", "host", "--build-arg", "TORCH=cpu", "--build-arg", f"BASE_IMAGE={base}"]
    podman.watch("build", *build, *options, "--tag", IMAGE, str(ROOT))
    print(f"built from {base} in {time.monotonic() - before:.0f} s")
    (inspected,) = json.loads(podman.run("image", "inspect", IMAGE).stdout)
    yield from image_facts.of_image(inspected)
    locked = image_facts.locked_versions((ROOT / "requirements.lock").read_text())
    yield from _of_container(podman, locked)
    yield _of_loose_container(podman, locked)


def _linted() -> Point:
    # The lines that it leaves out say why.
    done = subprocess.run(
        ["hadolint", "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True
    )
    found = (done.stdout + done.stderr).strip()
    return Point("Dockerfile, by hadolint", found or "no finding", done.returncode == 0)


def _base(podman: Podman, given: str | None) -> str:
    """-> the name of an image that is there."""
    if given == "debootstrap":
        if podman.run("image", "exists", BASE, check=False).returncode:
            podman.make_base(BASE)
        return BASE
    (own,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    name = given or f"docker.io/library/{own}"
    if podman.run("pull", name, check=False).returncode:
        print(
            f"{name} cannot be pulled. BASE_IMAGE=NAME takes another (any with Python 3.11 or "
            "later, venv and pip); BASE_IMAGE=debootstrap makes one of Debian's packages"
        )
        raise SystemExit(1)
    return name


def _of_container(podman: Podman, locked: dict[str, str]) -> Iterator[Point]:
    (port,) = free_ports(1)
    variables = OPTIONS | {"PORT": f"{port}"}
    given = [f"--env=NV_EMBED_{name}={value}" for name, value in variables.items()]
    before = time.monotonic()
    name = podman.run("run", "--detach", "--network", "host", *HARDENED, *given, IMAGE)
    container = name.stdout.strip()
    ready = _becomes_ready(podman, container, f"http://127.0.0.1:{port}")
    yield Point("ready", f"after {time.monotonic() - before:.1f} s" if ready else "never", ready)
    if not ready:
        print(podman.run("logs", container, check=False))
        return
    yield from image_facts.of_inside(_seen(podman, "exec", "-i", container, "python"), locked)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        inside = _vectors(client)
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(None, log=Path(folder) / "log").wait_ready()
        try:
            outside = _vectors(server.client)
        finally:
            server.stop()
    yield image_facts.of_vectors(inside, outside)
    swapped = image_facts.of_vectors(inside, outside[::-1])
    yield Point("vectors of other texts", swapped.figure, not swapped.right)
    healthy = podman.run("healthcheck", "run", container, check=False).returncode
    yield Point("podman healthcheck run", f"exit status {healthy}", healthy == 0)
    (closed,) = free_ports(1)
    check = ["python", "-I", "/opt/nv-embed/healthcheck.py"]
    elsewhere = ["exec", f"--env=NV_EMBED_PORT={closed}", container, *check]
    unhealthy = podman.run(*elsewhere, check=False).returncode
    yield Point("the same where nobody listens", f"exit status {unhealthy}", unhealthy == 1)
    before = time.monotonic()
    podman.run("stop", "--time", f"{GRACE_S}", container)
    took = time.monotonic() - before
    (state,) = json.loads(podman.run("container", "inspect", container).stdout)
    status = state["State"]["ExitCode"]
    yield Point("podman stop", f"exit status {status} after {took:.1f} s", status == 0)
    log = podman.run("logs", container)
    failures = [line for line in (log.stdout + log.stderr).splitlines() if "Traceback" in line]
    yield Point("tracebacks in its log", f"{len(failures)}", not failures)
    podman.run("rm", "--volumes", container)


def _of_loose_container(podman: Podman, locked: dict[str, str]) -> Point:
    """Root, with everything allowed and a compiler: what is judged of the inside must be wrong."""
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder) / "gcc"
        compiler.write_text("#!/bin/sh\n")
        compiler.chmod(0o755)
        run = ["run", "--rm", "-i", "--network", "host", "--user", "0", "--entrypoint", "python"]
        run += ["--volume", f"{compiler}:/usr/local/bin/gcc:ro", IMAGE]
        seen = _seen(podman, *run)
    points = [*image_facts.of_inside(seen, locked | {"no-such-package": "1"})]
    missed = [point.name for point in points if point.right]
    missed.remove("packages for GPUs")  # a test shows these found: here they would be gigabytes
    figure = f"missed: {', '.join(missed)}" if missed else f"{len(points) - 1} faults found"
    return Point("a container without limits", figure, not missed)


def _seen(podman: Podman, *command: str) -> dict[str, Any]:
    """By the probe, which this command's Python reads from its standard input."""
    text = podman.run(*command, "-I", "-", given=PROBE.read_text()).stdout
    seen: dict[str, Any] = json.loads(text)
    return seen


def _becomes_ready(podman: Podman, container: str, url: str) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                return True
        running = podman.run("container", "inspect", "--format", "{{.State.Running}}", container)
        if running.stdout.strip() != "true":
            return False
        time.sleep(0.1)
    return False


def _vectors(client: httpx.Client) -> list[list[float]]:
    answer = client.post("/v1/embeddings", json={"input": TEXTS})
    answer.raise_for_status()
    return [item["embedding"] for item in answer.json()["data"]]


if __name__ == "__main__":
    sys.exit(main())
