"""How a client is judged, and that the page shows what the last run found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.clients import page
from tests.clients.client import ALL_TOLD, MISTAKES, SERVERS, Client
from tests.clients.environments import HERE
from tests.clients.judge import Expected, Shown, faults, judge
from tests.clients.run import served
from tests.clients.suites import SUITES
from tests.clients.table import CLIENTS

RIGHT = Expected(np.eye(3, 4), np.full(4, 0.5), np.array([0.0, 0.0, 0.0, 1.0]), np.full(3, 0.5))
ROW = Client("a client", "package", "sdks", "adapter")


def found(**changed: Any) -> dict[str, Any]:
    """A client that shows all: its query method gives the query's vector."""
    return {
        "passages": {"value": RIGHT.passages.tolist()},
        "query": {"value": RIGHT.query.tolist()},
        "by_suffix": {"value": RIGHT.query.tolist()},
        "by_url": {"value": RIGHT.query.tolist()},
        **{name: {"error": f"Error: {words}"} for name, words in MISTAKES.items()},
        **changed,
    }


NOT = {"value": RIGHT.as_passage.tolist()}
NEVER = {"value": None}


@pytest.mark.parametrize(
    ("changed", "side", "silent"),
    [
        ({}, "Q", False),
        ({"query": NEVER}, "q", False),
        ({"query": NOT}, "q", True),
        ({"query": NOT, "by_suffix": NOT}, "u", True),
        ({"query": NEVER, "by_suffix": NOT, "by_url": NOT}, "-", False),
        ({"query": {"error": "no"}}, "q", False),
    ],
)
def test_the_side(changed: dict[str, Any], side: str, silent: bool) -> None:
    assert judge(found(**changed), RIGHT) == Shown(True, side, silent, ALL_TOLD)


@pytest.mark.parametrize(
    "passages",
    [
        RIGHT.passages[::-1].tolist(),
        RIGHT.passages[:2].tolist(),
        RIGHT.passages[:, :3].tolist(),
        (RIGHT.passages + 0.01).tolist(),
        np.zeros((3, 4)).tolist(),
        np.full((3, 4), np.nan).tolist(),
        [[1.0], [1.0, 2.0], []],
        "error",
        None,
    ],
    ids=str,
)
def test_other_vectors_are_not_right(passages: object) -> None:
    assert not judge(found(passages={"value": passages}), RIGHT).passages
    nearly = (RIGHT.passages * 3 + 1e-7).tolist()  # a length is the client's to choose
    assert judge(found(passages={"value": nearly}), RIGHT).passages


def test_scores_are_judged_one_by_one() -> None:
    for scores, right in (([0.5, 0.5, 0.5], True), ([0.5, 0.5, 0.6], False), ([0.5], False)):
        shown = judge(found(passages={"value": scores}), RIGHT, ranks=True)
        assert (shown.passages, shown.side) == (right, "-")


def test_what_reaches_the_user() -> None:
    shown = judge(found(long={"error": "KeyError: '0'"}, key={"value": []}), RIGHT)
    assert shown.told == ("model",)
    assert judge({"passages": {"error": "404"}}, RIGHT) == Shown(False, why="404")


def test_a_row_is_held_in_both_directions() -> None:
    shown = Shown(True, "q", False, ALL_TOLD)
    assert faults(ROW, shown) == []
    for more_or_less in ({"side": "Q"}, {"side": "-"}, {"silent": True}, {"told": ("key",)}):
        assert len(faults(ROW, replace(shown, **more_or_less))) == 1
    broken = Shown(False, why="404 says: dimensions")
    assert faults(ROW, broken) == ["passages: 404 says: dimensions"]
    waiting = replace(ROW, not_yet="its routes")
    assert faults(waiting, broken) == []
    assert "it works now" in faults(waiting, shown)[0]
    refused = replace(ROW, refused="dimensions")
    assert faults(refused, broken) == []
    assert faults(refused, shown)
    assert faults(refused, Shown(False, why="404"))


def test_rows_are_whole() -> None:
    names = [client.name for client in CLIENTS]
    assert len(set(names)) == len(names) >= 40
    for client in CLIENTS:
        assert client.server in SERVERS
        assert set(client.told) <= set(MISTAKES), client
        assert not (client.refused and client.not_yet), client
    assert served(SERVERS["ada"]) == "text-embedding-ada-002"
    assert served(SERVERS["keys"]) == "nv-embed-small"


def test_the_page_shows_the_last_run_and_that_was_of_this_table() -> None:
    result = json.loads(page.RESULTS.read_text())
    text = page.PAGE.read_text()
    assert page.written(text, page.table(result)) == text, "python -m tests.clients.page"
    rows = {row["client"]: row for row in result["clients"]}
    assert list(rows) == [client.name for client in CLIENTS], "make test-clients, and copy results"
    for client in CLIENTS:
        row = rows[client.name]
        shown = Shown(row["passages"], row["side"], row["silent"], tuple(row["told"]), row["why"])
        assert faults(client, shown) == []
        assert (row["note"], row["not_yet"]) == (client.note, client.not_yet)
    assert [suite["suite"] for suite in result["suites"]] == [suite.name for suite in SUITES]
    assert all(suite["as_expected"] for suite in result["suites"])


def test_every_list_is_pinned_and_without_torch() -> None:
    lists = sorted(HERE.glob("requirements-*.txt"))
    modules = {client.module for client in CLIENTS} - {"node"}
    assert {file.stem.removeprefix("requirements-") for file in lists} == modules
    for file in lists:
        for line in file.read_text().splitlines():
            name, equals, version = line.partition("==")
            assert equals
            assert version, line
            assert name not in ("torch", "triton")
    package = json.loads((HERE / "node" / "package.json").read_text())
    lock = json.loads((HERE / "node" / "package-lock.json").read_text())["packages"]
    for name, version in package["dependencies"].items():
        assert lock[f"node_modules/{name}"]["version"] == version
