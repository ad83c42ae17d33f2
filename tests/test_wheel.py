"""The wheel, installed into an environment of its own, serves from an unfriendly folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]


def test_the_wheel_serves_from_a_folder_with_a_server_py(tmp_path: Path) -> None:
    """The environment holds the wheel; its dependencies are borrowed from the tests' own, by a
    path line, which does not bring the editable install along. Nothing is downloaded."""
    source = tmp_path / "source"  # a copy: a build leaves its own files in its folder
    for name in ("server", "model"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("nv_embed_server-*.whl")
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--prefix", str(environment), "--ignore-installed", str(wheel)]
    subprocess.run(install, check=True)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("server.py", "model.py"):
        (folder / name).write_text("raise SystemExit('the wrong module was imported')\n")
    python = environment / "bin" / "python"
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = subprocess.run(
        [python, "-P", "-c", "import server, model; print(server.__file__, model.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=environ,
    ).stdout
    assert where.count(str(environment)) == 2, where

    command = [python, environment / "bin" / "nv-embed", "serve"]
    command += ["--port", "0", "--threads", "1"]  # and no --model: the wheel brings one
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=folder, stderr=file, env=environ)
    try:
        deadline = time.monotonic() + 60
        while "is ready after" not in log.read_text() and time.monotonic() < deadline:
            assert process.poll() is None, f"exit {process.returncode}: {log.read_text()}"
            time.sleep(0.05)
        match = re.search(r"listening on (\S+);", log.read_text())
        assert match is not None, log.read_text()
        answer = httpx.post(
            f"{match[1]}/v1/embeddings", json={"model": "nv-embed-small", "input": "x"}, timeout=30
        )
        assert answer.status_code == 200, answer.text
        page = httpx.get(f"{match[1]}/", timeout=30)  # its parts are no modules
        assert page.text.startswith("<!doctype html>"), page.text
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:  # without a word that would hide what went wrong
        process.kill()
        process.wait()
