"""Suites that other makers wrote for such clients, run as they are in the client's environment."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.clients.environments import BUILD, HERE, ROOT, environment, python_of


@dataclass(frozen=True, slots=True)
class Suite:
    """`select`: its class in langchain_standard.py."""

    name: str
    select: str
    tests: int
    server: str = "keys"
    not_yet: str = ""


SUITES = [
    Suite("langchain-tests, NVIDIAEmbeddings", "TestNVIDIA", 5),
    Suite("langchain-tests, OpenAIEmbeddings, check_embedding_ctx_length=False", "TestOpenAI", 5),
    Suite(
        "langchain-tests, OpenAIEmbeddings, cl100k decoded",
        "TestDefaults",
        5,
        "cl100k",
    ),
]


def run(url_of: Callable[[str], str], key: str, model: str) -> list[dict[str, Any]]:
    found = []
    for suite in SUITES:
        env = environment("langchain")
        env |= {"CLIENTS_URL": url_of(suite.server), "CLIENTS_KEY": key, "CLIENTS_MODEL": model}
        file = HERE / "langchain_standard.py"
        command = [str(python_of("langchain")), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # The project's own conftest.py would import what is not here.
        command += [
            "--asyncio-mode=auto",
            "--noconftest",
            "--rootdir",
            str(BUILD),
            "-c",
            "/dev/null",
            f"{file}::{suite.select}",
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
        )
        passed = int((re.findall(r"(\d+) passed", done.stdout) or ["0"])[0])
        as_expected = (passed == suite.tests) != bool(suite.not_yet)
        said = done.stdout[-2000:] + done.stderr[-500:] if not as_expected else ""
        word = "FAIL" if not as_expected else "not yet" if suite.not_yet else "ok"
        print(f"{word:7} {suite.name}: {passed} of {suite.tests}", flush=True)
        found.append(
            {
                "suite": suite.name,
                "version": version(),
                "passed": passed,
                "tests": suite.tests,
                "not_yet": suite.not_yet,
                "as_expected": as_expected,
                "said": said,
            }
        )
    return found


def version() -> str:
    code = "from importlib.metadata import version; print(version('langchain-tests'))"
    done = subprocess.run([str(python_of("langchain")), "-c", code], capture_output=True, text=True)
    return done.stdout.strip()
