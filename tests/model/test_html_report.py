"""A page of figures: whole by itself, its bars as long as their values, its texts as texts."""

from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from model.html_report import Bar, Chart, Table, page

NASTY = "<script>alert('x')</script> & \"y\""
_VOID = {"meta", "rect", "line"}


class Elements(HTMLParser):
    """(tag, attributes) of all that is open somewhere; fails where tags are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def number(text: str | None) -> float:
    assert text is not None
    return float(text)


def test_texts_are_texts_and_nothing_is_loaded() -> None:
    raw = {"name": NASTY}
    parts = [Chart(NASTY, [Bar(NASTY, 1.0)], NASTY), Table(NASTY, [NASTY], [[NASTY]])]
    html = page(NASTY, {NASTY: NASTY}, parts, raw)
    elements = Elements(html)
    assert not elements.of("script")
    assert not re.findall(r"https?:|src=|href=|url\(|@import", html)
    (found,) = re.findall(r"<pre>(.*?)</pre>", html)
    assert json.loads(unescape(found)) == raw


def test_bars_are_as_long_as_their_values() -> None:
    bars = [Bar("a", 0.5, 0.25, 0.75), Bar("b", 1.0), Bar("c", 0.0, colour=1)]
    elements = Elements(page("t", {}, [Chart("c", bars)], {}))
    widths = [number(rect["width"]) for rect in elements.of("rect")]
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.1)
    assert widths[2] == 1, "seen, all the same"
    zero, whisker = elements.of("line")
    for end, share in (("x1", 0.25), ("x2", 0.75)):
        place = number(whisker[end]) - number(zero["x1"])
        assert place == pytest.approx(share * widths[1], abs=0.2)
    colours = [rect["fill"] for rect in elements.of("rect")]
    assert colours[0] == colours[1] != colours[2]


def test_bars_below_zero_go_to_the_left() -> None:
    bars = [Bar("worse", -0.2, -0.3, -0.1), Bar("better", 0.1)]
    elements = Elements(page("t", {}, [Chart("c", bars)], {}))
    worse, better = elements.of("rect")
    zero = number(elements.of("line")[0]["x1"])
    assert number(worse["x"]) + number(worse["width"]) == pytest.approx(zero, abs=0.2)
    assert number(better["x"]) == pytest.approx(zero, abs=0.2)
    assert number(worse["width"]) == pytest.approx(2 * number(better["width"]), abs=0.3)


def test_a_table_has_every_cell() -> None:
    table = Table("t", ["name", "value"], [["a", 0.123456], ["b", None]])
    html = page("t", {}, [table], {})
    assert "<tr><td>a</td><td>0.1235</td></tr>" in html
    assert "<tr><td>b</td><td></td></tr>" in html
    assert Elements(html).of("th")
