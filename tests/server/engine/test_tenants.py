"""cache_salt and priority of a request, over HTTP: who shares vectors, and who comes first."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS

pytestmark = pytest.mark.process
HITS, MISSES = "nv_embed_cache_hits_total", "nv_embed_cache_misses_total"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("held") / "held"


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, held: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    options = ("--runner", RUNNERS + "Held", "--max-batch-seqs", "1", "--cache-bytes", "1000000")
    log = tmp_path_factory.mktemp("tenants") / "log"
    environment = {"FAKE_HELD": str(held), "FAKE_SECONDS": "0.05"}  # answers come one by one
    with serving(golden_checkpoint, *options, log=log, env=environment) as ready:
        yield ready


def hits(server: ServerProcess, **fields: object) -> tuple[float, Any]:
    """How many more of its inputs were known, and the vectors."""
    before = server.metric(HITS)
    vectors = server.vectors(**fields)
    return server.metric(HITS) - before, vectors


def test_two_salts_share_no_hit_and_one_does(server: ServerProcess) -> None:
    text = "a question that two tenants have"
    misses = server.metric(MISSES)
    first, vectors = hits(server, input=text, cache_salt="one")
    assert (first, server.metric(MISSES) - misses) == (0, 1)
    for salt in ("two", "one ", "ONE"):
        assert hits(server, input=text, cache_salt=salt) == (0, vectors), salt
    assert hits(server, input=text) == (0, vectors), "nor one without"
    for fields in ({}, {"cache_salt": None}, {"cache_salt": "one"}, {"cache_salt": "two"}):
        assert hits(server, input=text, **fields) == (1, vectors), fields


def test_a_lower_priority_comes_first(server: ServerProcess, held: Path) -> None:
    """While one batch is held up, what waits behind it is put in order."""
    order: list[int] = []

    def ask(level: int) -> None:
        server.vectors(input=f"level {level}", **({} if level == 0 else {"priority": level}))
        order.append(level)

    held.touch()
    try:
        with ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(ask, 10)]
            server.wait_for_metric("nv_embed_running_requests", 1)
            for count, level in enumerate((5, 0, -10, -1), 1):
                waiting.append(pool.submit(ask, level))
                server.wait_for_metric("nv_embed_waiting_requests", count)
            held.unlink()
            for one in waiting:
                one.result()
    finally:
        held.unlink(missing_ok=True)
    assert order[0] == 10, "it had begun"
    assert order[1:] == [-10, -1, 0, 5]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("cache_salt", "x" * 1025),
        ("priority", -11),
        ("priority", 11),
        ("priority", 1.5),
        ("priority", "high"),
        ("priority", True),
    ],
)
def test_what_they_cannot_be(server: ServerProcess, name: str, value: object) -> None:
    answer = server.embed(input="x", **{name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
