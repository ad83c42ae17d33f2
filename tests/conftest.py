"""What all tests share: checkpoints, servers, and what sets those apart that start processes.

A test is marked `process` by its folder, by a fixture that it uses, or by itself; one that starts a
process without the mark fails. So `-m "not process"` is all that runs within pytest's own process.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model import tokenizer_file
from tests.checkpoints import tokenizer_of, write_checkpoint
from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS

MARKS_OF_FOLDERS = {
    "bench": ("process",),
    "browser": ("process",),
    "examples": ("process",),
    "chaos": ("process",),
    "model/training": ("process", "whole"),
}
FIXTURES_OF_PROCESSES = {"golden_server", "hashing_server"}
STARTS = {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.system"}
started: list[str] = []
"""By the test that runs, and by the fixtures that were set up for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parent.as_posix()
        for mark in MARKS_OF_FOLDERS.get(folder, ()):
            item.add_marker(mark)
        if folder != "chaos" and item.get_closest_marker("timing"):
            raise pytest.UsageError(f"{item.nodeid}: `make test` looks for timing in tests/chaos")
        if FIXTURES_OF_PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("process")
    # The soak is the longest of those that run three at a time: what its process has before it
    # comes last, where another one takes it over.
    items.sort(key=lambda item: item.path.name == "test_priority.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is loaded here stays: the garbage collector need not look through it, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_finish() -> None:
    # torch's 70 loggers do not pass on what they are told: pytest puts its handlers on each of
    # them, six times for each test.
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("torch.") and isinstance(logger, logging.Logger):
            logger.propagate = True


def note_start(event: str, arguments: tuple[Any, ...]) -> None:
    # The openai client asks `uname` for its headers.
    if event in STARTS and arguments[:1] != ("uname",):
        started.append(f"{event} {arguments[:2]}")


sys.addaudithook(note_start)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    started.clear()


@pytest.fixture(autouse=True)
def only_marked_tests_start_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.node.get_closest_marker("process") is None:
        assert not started, f"mark this test `process`, for it starts one: {started}"


@pytest.fixture(scope="session", autouse=True)
def vocabularies_are_parsed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_file, "Tokenizer", SimpleNamespace(from_str=tokenizer_of))
        yield


@pytest.fixture
def signals_as_usual() -> Iterator[None]:
    """xdist's workers ignore SIGINT, and nohup has all ignore SIGHUP; children inherit that."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that golden.json's values belong to. Read-only: tests that change it copy."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "golden")


@pytest.fixture(scope="session")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe at a width where low precision behaves more as at the official one."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "wide", "wide")


@pytest.fixture(scope="session")
def golden_server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The golden checkpoint, served at float32 with the default options."""
    log = tmp_path_factory.mktemp("golden_server") / "log"
    with serving(golden_checkpoint, log=log) as server:
        yield server


@pytest.fixture(scope="session")
def hashing_server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The default options, with vectors that hash their ids. Tests leave it as they found it."""
    log = tmp_path_factory.mktemp("hashing_server") / "log"
    with serving(golden_checkpoint, "--runner", f"{RUNNERS}Hashing", log=log) as server:
        yield server
