"""Both pages at both sizes, light and dark: axe-core finds nothing, nothing sticks out sideways.

SCREENSHOTS=FOLDER keeps what was seen (`make screenshots` renews those of docs/).
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from model import html_report
from model.html_report import Bar, Chart, Table
from tests.browser.conftest import SCHEMES, SIZES, Open, embedded
from tests.server.processes import ROOT, ServerProcess

AXE = ROOT / "build/browser/node/node_modules/axe-core/axe.min.js"
MOST_BYTES = 150_000

looks = pytest.mark.parametrize(
    ("size", "scheme"), [(size, scheme) for size in SIZES for scheme in SCHEMES]
)


@looks
def test_the_playground(open_page: Open, size: str, scheme: str) -> None:
    page = open_page("/", size=size, scheme=scheme)
    page.locator("#model", has_text="nv-embed-small").wait_for()
    check(page, scheme)
    embedded(page)
    check(page, scheme)
    keep(page, f"playground-{size}-{scheme}")
    page.select_option("#query-side", "instruction")
    page.fill("#passages", "\n".join(f"This is passage {n}." for n in range(25)))
    page.get_by_role("button", name="Embed").click()
    page.locator("#map circle").nth(25).wait_for()
    check(page, scheme)


@looks
def test_the_interface(open_page: Open, size: str, scheme: str) -> None:
    page = open_page("/docs", size=size, scheme=scheme)
    page.locator("summary").first.wait_for()
    page.evaluate("document.querySelectorAll('details').forEach((it) => (it.open = true))")
    page.get_by_role("button", name="Send").first.click()
    page.locator("pre:visible").wait_for()
    check(page, scheme)


@looks
def test_the_field_for_a_key(
    open_page: Open, keyed_server: ServerProcess, size: str, scheme: str
) -> None:
    for path in ("/", "/docs"):
        page = open_page(path, of=keyed_server, size=size, scheme=scheme, refused=True)
        page.locator("#key-form").wait_for()
        check(page, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_report(chromium: Any, tmp_path: Path, scheme: str) -> None:
    """Of `evaluate` and the benchmarks: a file."""
    bars = [Bar("a set", 0.5, 0.4, 0.6), Bar("another", -0.1, -0.2, 0.05, colour=1)]
    parts = [Chart("ndcg", bars), Table("Scores", ["set", "score"], [["a set", 0.5]])]
    file = tmp_path / "report.html"
    file.write_text(html_report.page("A report", {"model": "one"}, parts, {"a": 1}))
    context = chromium.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(file.as_uri())
    page.locator("summary").click()
    found = [(one["id"], one["impact"]) for one in violations(page)]
    context.close()
    assert not found


def test_axe_finds_what_is_wrong(open_page: Open) -> None:
    """That it runs at all under the page's policy: a fault put in is found."""
    page = open_page("/")
    page.evaluate("document.querySelector('label[for=query]').remove()")
    page.evaluate("document.querySelector('h1').style.color = '#eee'")
    assert {"label", "color-contrast"} <= {found["id"] for found in violations(page)}


def violations(page: Any) -> list[dict[str, Any]]:
    page.evaluate(AXE.read_text())
    found: list[dict[str, Any]] = page.evaluate("axe.run().then((result) => result.violations)")
    return found


def check(page: Any, scheme: str) -> None:
    for found in violations(page):
        where = [node["html"] for node in found["nodes"]]
        raise AssertionError(f"{found['id']} ({found['impact']}): {where}")
    width = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1], "it scrolls sideways"
    ground = page.evaluate("getComputedStyle(document.documentElement).colorScheme")
    assert ground == "light dark"
    red = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0]")
    assert (int(red) < 60) == (scheme == "dark")


def keep(page: Any, name: str) -> None:
    """As WebP without a loss."""
    folder = os.environ.get("SCREENSHOTS")
    if folder is None:
        return
    from PIL import Image

    file = Path(folder) / f"{name}.webp"
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.save(file, lossless=True, method=6)
    assert file.stat().st_size < MOST_BYTES, file
