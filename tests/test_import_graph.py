"""docs/imports.svg shows the imports that there are."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import import_graph
from tests.layers import SERVER, WINGS, layers


def test_the_committed_drawing_is_of_this_code() -> None:
    assert import_graph.SVG.read_text() == import_graph.svg(), "run `make graph` and commit"


def test_every_room_and_module_is_drawn() -> None:
    drawn = {element.text for element in ElementTree.fromstring(import_graph.svg()).iter()}  # noqa: S314
    assert {name.removeprefix("model.") for name in layers()["model"]} <= drawn
    assert import_graph.PLACES.keys() == {*SERVER, "model"}


def test_there_is_no_circle_and_no_arrow_that_the_table_forbids() -> None:
    arrows = import_graph.rooms()
    assert len(arrows) > 10
    for room, used in arrows:
        assert used in ("", "model", *WINGS.get(room, ())), (room, used)
        assert (used, room) not in arrows
        assert import_graph.PLACES[room][1] < import_graph.PLACES[used][1], "an arrow points up"


def test_a_new_import_changes_the_drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = import_graph.svg()
    files = {name: dict(import_graph.modules(name)) for name in ("model", "server")}
    changed = tmp_path / "tls.py"
    old = files["server"]["server.http.tls"].read_text()
    changed.write_text(old + "import server.engine.pace\n")
    files["server"]["server.http.tls"] = changed
    monkeypatch.setattr(import_graph, "modules", lambda package: files[package])
    assert import_graph.svg() != before


def test_the_rooms_of_the_model_form_no_circle() -> None:
    """A folder counts as one: its files may import each other, and no way leads out and back in."""
    graph: dict[str, set[str]] = {}
    for name, used in import_graph.of_model().items():
        room = name.split(".")[1]
        graph.setdefault(room, set()).update({target.split(".")[1] for target in used} - {room})
    while free := {room for room, used in graph.items() if not used}:
        graph = {room: used - free for room, used in graph.items() if room not in free}
    assert not graph, f"a circle among {sorted(graph)}"
