"""Figures as one HTML file: what was measured, bars with their intervals, tables, the raw numbers.

Nothing is loaded from elsewhere, nothing runs: it can be sent by mail, and opened in ten years.
Knows nothing of what the figures mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_COLOURS = ("#2f6fb2", "#c9782b", "#3d8b5f", "#8a5aa8", "#b0413e", "#5f6b7a")
_WIDTH, _NAMES, _ROW = 760, 260, 26
"""Of a chart, in SVG's units: all of it, what names take, what a bar takes."""
_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: CanvasText; font-size: 13px; }
svg line { stroke: CanvasText; } svg .zero { stroke: GrayText; }
div { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; }
td { border-top: 1px solid GrayText; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """low, high: the interval that the value lies in, where one is known. Bars of one colour belong
    together, by its number."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Chart:
    """words: what its figures are, in a sentence."""

    title: str
    bars: Sequence[Bar]
    words: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[object]]


def page(
    title: str,
    facts: Mapping[str, object],
    parts: Sequence[Chart | Table],
    raw: Mapping[str, Any],
) -> str:
    """facts: what was measured, how and where. raw: everything, as JSON at the end."""
    known = [[escape(name), escape(str(value))] for name, value in facts.items()]
    body = [f"<h1>{escape(title)}</h1>", _table("About", ["what", "which"], known)]
    for part in parts:
        body.append(f"<h2>{escape(part.title)}</h2>")
        if isinstance(part, Chart):
            body.append(f"<p>{escape(part.words)}</p>" if part.words else "")
            body.append(_svg(part))
        else:
            rows = [[escape(_shown(cell)) for cell in row] for row in part.rows]
            body.append(_table(part.title, [escape(head) for head in part.heads], rows))
    numbers = escape(json.dumps(raw, ensure_ascii=False))
    body.append("<h2>All numbers</h2>")
    body.append(f"<details><summary>JSON</summary><pre>{numbers}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _shown(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """heads, rows: escaped. It scrolls by itself where it is too wide, by keyboard, too."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div tabindex="0" role="region" aria-label="Table: {escape(title)}">{table}</div>'


def _svg(chart: Chart) -> str:
    """Bars from zero, one a line, each with its name, its value, and a whisker for its interval."""
    ends = [0.0]
    for bar in chart.bars:
        ends += [x for x in (bar.value, bar.low, bar.high) if x is not None]
    least, most = min(ends), max(ends)
    room = _WIDTH - _NAMES - 80  # at the right stand the values
    scale = room / ((most - least) or 1)

    def x(value: float) -> float:
        return round(_NAMES + (value - least) * scale, 1)

    height = _ROW * len(chart.bars) + 8
    label = f"{chart.title}: " + ", ".join(f"{b.name} {_shown(b.value)}" for b in chart.bars)
    marks = [f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{height}"/>']
    for row, bar in enumerate(chart.bars):
        y = _ROW * row + 6
        left, right = sorted((x(0), x(bar.value)))
        colour = _COLOURS[bar.colour % len(_COLOURS)]
        marks.append(f'<text x="{_NAMES - 8}" y="{y + 14}" text-anchor="end">{_name(bar)}</text>')
        marks.append(
            f'<rect x="{left}" y="{y}" width="{max(right - left, 1):.1f}" height="{_ROW - 8}" '
            f'fill="{colour}"/>'
        )
        far = right
        if bar.low is not None and bar.high is not None:
            middle = y + (_ROW - 8) / 2
            far = max(right, x(bar.high))
            marks.append(
                f'<line x1="{x(bar.low)}" x2="{x(bar.high)}" y1="{middle}" y2="{middle}" '
                'stroke-width="2"/>'
            )
        marks.append(f'<text x="{far + 6}" y="{y + 14}">{_shown(float(bar.value))}</text>')
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">\n'
        + "\n".join(marks)
        + "\n</svg>"
    )


def _name(bar: Bar) -> str:
    """Cut at its beginning to what fits: the ends of paths differ."""
    most = 36
    return escape(bar.name if len(bar.name) <= most else f"…{bar.name[-most + 1 :]}")
