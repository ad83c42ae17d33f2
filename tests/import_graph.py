"""`make graph`: the import graph as docs/imports.svg, from the table and the files that it names.

Of `server` the rooms, with how many imports lead from one to another; of `model` its modules.
Plain SVG: nothing in it depends on a machine, so that the same code gives the same file.
"""

from __future__ import annotations

from collections import Counter
from xml.sax.saxutils import escape

from tests.layers import ROOT, SERVER, layers, modules, uses, wing_of

SVG = ROOT / "docs/imports.svg"
LABELS = {"": "files on top"}
# (centre x, centre y) of each room: whoever imports stands above what it imports.
PLACES = {
    "cli": (350, 60),
    "ray": (75, 120),
    "http": (190, 225),
    "offline": (540, 225),
    "api": (330, 310),
    "engine": (450, 405),
    "": (90, 500),
    "model": (600, 530),
}
# How far an arrow is bent aside, where a straight one would run through a room or over a number.
BENDS = {
    ("api", "model"): 200,
    ("cli", ""): -40,
    ("http", "engine"): -200,
    ("http", "model"): -400,
    ("offline", ""): 80,
}
BOX = (130, 44)
PER_ROW, CELL, TOP = 5, (136, 46), 640


def rooms() -> Counter[tuple[str, str]]:
    """(room, room that it imports) -> between how many pairs of files; `model` is one room."""
    known, found = layers()["server"], Counter[tuple[str, str]]()
    in_model = layers()["model"] + layers()["model.training"]
    for name, path in modules("server").items():
        room = wing_of(name)
        found.update((room, wing_of(used)) for used in uses(path, known))
        found.update((room, "model") for _ in uses(path, in_model))
    return Counter({pair: count for pair, count in found.items() if pair[0] != pair[1]})


def of_model() -> dict[str, list[str]]:
    """Module of `model` -> those that it imports, both in the table's order."""
    order = layers()["model"]
    files = modules("model")
    return {name: sorted(uses(files[name], order), key=order.index) for name in order}


def svg() -> str:
    """The drawing."""
    lines = [_text(320, 24, "server: who imports whom, and how often", size=15)]
    for (room, used), count in sorted(rooms().items()):
        lines.append(_arrow(room, used, count))
    for room, (x, y) in PLACES.items():
        files = len(SERVER[room]) if room in SERVER else len(layers()["model"])
        name = LABELS.get(room, f"{room}/")
        lines.append(_box(x, y, *BOX, f"{name}  ({files})" if files > 1 else name))
    lines += _modules()
    rows = -(-len(layers()["model"]) // PER_ROW)
    height = TOP + rows * CELL[1] + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 {height}" '
        'font-family="sans-serif" font-size="13">\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#667"/></marker></defs>\n'
        f'<rect width="700" height="{height}" fill="white"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def _modules() -> list[str]:
    """The modules of `model`, lowest last: each line of a box names how many it imports."""
    graph = of_model()
    names = list(reversed(graph))
    lines = [
        _text(320, TOP - 44, "model: each module imports only modules that stand after it", size=15)
    ]
    for place, name in enumerate(names):
        x = 78 + (place % PER_ROW) * CELL[0]
        y = TOP + (place // PER_ROW) * CELL[1]
        short = name.removeprefix("model.")
        used = ", ".join(target.removeprefix("model.") for target in graph[name]) or "nothing"
        box = _box(x, y, CELL[0] - 8, 30, short, size=11)
        lines.append(f"<g><title>{escape(short)} imports {escape(used)}</title>{box}</g>")
    return lines


def _arrow(room: str, used: str, count: int) -> str:
    (x1, y1), (x2, y2) = PLACES[room], PLACES[used]
    half = BOX[1] / 2
    y1, y2 = y1 + half, y2 - half
    middle = (x1 + x2) / 2 + BENDS.get((room, used), 0), (y1 + y2) / 2
    at = (x1 + 2 * middle[0] + x2) / 4, (y1 + y2) / 2
    line = (
        f'<path d="M{x1} {y1:g}Q{middle[0]:g} {middle[1]:g} {x2} {y2:g}" fill="none" '
        'stroke="#99a" marker-end="url(#tip)"/>'
    )
    return line + _text(at[0], at[1], str(count), size=11, halo=True)


def _box(x: float, y: float, width: float, height: float, text: str, *, size: int = 13) -> str:
    return (
        f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width}" height="{height}" '
        f'rx="6" fill="#eef2fa" stroke="#57a"/>{_text(x, y + 4, text, size=size)}'
    )


def _text(x: float, y: float, text: str, *, size: int, halo: bool = False) -> str:
    around = ' paint-order="stroke" stroke="white" stroke-width="4"' if halo else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="{size}"{around}>'
        f"{escape(text)}</text>"
    )


if __name__ == "__main__":
    SVG.write_text(svg(), encoding="utf-8")
    print(f"{SVG.relative_to(ROOT)}: {len(rooms())} arrows between {len(PLACES)} rooms")
