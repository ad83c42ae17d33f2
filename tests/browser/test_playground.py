"""The playground in a browser: it shows what the server answers, by mouse and by keyboard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browser.conftest import KEY, Open, embedded
from tests.server.processes import ROOT, ServerProcess

QUERY = "when is lunch served?"
NODE = ROOT / "build/browser/node"


def passages_of(page: Any) -> list[str]:
    return [line for line in page.input_value("#passages").splitlines() if line]


def vectors(server: ServerProcess, texts: list[str], **fields: object) -> Any:
    return np.array(server.vectors(model="nv-embed-small", input=texts, **fields))


def test_it_shows_what_the_server_answers(open_page: Open, server: ServerProcess) -> None:
    page = embedded(open_page("/"))
    texts = passages_of(page)
    assert len(texts) == 6
    both = np.vstack(
        [
            vectors(server, [QUERY], input_type="query"),
            vectors(server, texts, input_type="passage"),
        ]
    )
    cosines = both @ both.T
    cells = np.array(page.locator("#heat td").all_inner_texts()[1:], dtype=float)
    np.testing.assert_allclose(cells.reshape(7, 7), cosines, atol=0.0051)
    order = np.argsort(-cosines[0, 1:])
    assert page.locator("#ranking .text").all_inner_texts() == [texts[i] for i in order]
    scores = np.array(page.locator("#ranking strong").all_inner_texts(), dtype=float)
    np.testing.assert_allclose(scores, cosines[0, 1:][order], atol=0.00051)
    assert page.locator("#map circle").count() == 7
    answer = server.embed(model="nv-embed-small", input="a")
    facts = page.inner_text("#facts")
    assert answer.headers["x-nv-embed-fingerprint"] in facts
    assert "nv-embed-small" in facts
    assert page.inner_text("#state") == "ready"


def test_the_brightest_cell_is_the_highest(open_page: Open) -> None:
    page = embedded(open_page("/"))
    cells = page.eval_on_selector_all(
        "#heat td", "all => all.map(td => [td.textContent, td.style.background])"
    )
    coloured = [(float(text), colour) for text, colour in cells if colour]
    assert len(coloured) == 42, "all but the diagonal"
    best = {colour for value, colour in coloured if value == max(coloured)[0]}
    assert best == {"rgb(250, 224, 110)"}


@pytest.mark.parametrize(
    ("side", "fields", "read_as"),
    [
        ("query", {"input_type": "query"}, "Given a question, retrieve passages"),
        ("instruction", {"instruction": "Find a rule"}, "Instruct: Find a rule ⏎ Query:"),
        ("task", {"task": "FEVER", "input_type": "query"}, "support or refute the claim"),
        ("passage", {"input_type": "passage"}, ""),
        ("none", {}, ""),
    ],
)
@pytest.mark.parametrize("same", [False, True])
def test_each_side_is_sent_as_it_is_chosen(
    open_page: Open, side: str, fields: dict[str, str], read_as: str, same: bool
) -> None:
    page = open_page("/")
    page.locator("#model", has_text="nv-embed-small").wait_for()
    page.select_option("#query-side", side)
    if side == "instruction":
        page.fill("#instruction", "Find a rule")
    if side == "task":
        page.select_option("#task", "FEVER")
    assert read_as in page.inner_text("#reads")
    assert bool(page.inner_text("#reads")) == bool(read_as)
    page.select_option("#passage-side", "same" if same else "passage")
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(json.loads(r.post_data)) if r.post_data else None)
    embedded(page)
    by_size = sorted(bodies, key=lambda body: len(body["input"]))
    expected = [fields, fields if same else {"input_type": "passage"}]
    if side == "task" and not same:
        expected[1] = {"task": "FEVER", "input_type": "passage"}
    for body, chosen in zip(by_size, expected, strict=True):
        for name in ("model", "input", "encoding_format"):
            del body[name]
        assert body == chosen


def test_texts_are_shown_as_texts(open_page: Open) -> None:
    page = open_page("/")
    nasty = "<img src=x onerror=\"document.title='run'\"> & <b>bold</b>"
    page.fill("#passages", f"{nasty}\nAnother one.")
    embedded(page)
    assert nasty in page.locator("#ranking .text").all_inner_texts()
    assert page.locator("#ranking img, #ranking b").count() == 0
    assert page.title() == "Playground: NV-Embed server"


def test_the_policy_holds(open_page: Open) -> None:
    """Were markup to slip in, its script would still not run, and nothing would go elsewhere."""
    page = open_page("/", refused=True)
    blocked = page.evaluate(
        """() => new Promise((resolve) => {
            const blocked = [];
            addEventListener("securitypolicyviolation", (event) => {
                blocked.push(event.effectiveDirective);
                if (blocked.length === 3) resolve(blocked);
            });
            fetch("http://127.0.0.1:9/").catch(() => null);
            const script = document.createElement("script");
            script.textContent = "document.title = 'run'";
            document.body.append(script);
            document.body.insertAdjacentHTML("beforeend", "<b onclick='document.title = 1'>x</b>");
        })"""
    )
    assert set(blocked) == {"connect-src", "script-src-elem", "script-src-attr"}
    assert page.title() == "Playground: NV-Embed server"


def test_what_the_server_refuses_is_said(open_page: Open) -> None:
    page = open_page("/", refused=True)
    page.fill("#query", "word " * 3000)
    page.get_by_role("button", name="Embed").click()
    said = page.locator("#said.error")
    said.wait_for()
    assert "2048" in said.inner_text()
    page.fill("#passages", "\n".join(["a"] * 101))
    page.get_by_role("button", name="Embed").click()
    page.locator("#said", has_text="101 passages are too many.").wait_for()


def test_a_server_that_stops_is_seen(open_page: Open, tmp_path: Path) -> None:
    other = ServerProcess(None, log=tmp_path / "log").wait_ready()
    page = open_page("/", of=other, refused=True)
    page.locator("#state.good").wait_for()
    assert other.stop() == 0
    page.locator("#state.bad", has_text="does not answer").wait_for()
    page.get_by_role("button", name="Embed").click()
    page.locator("#said.error", has_text="does not answer").wait_for()


def test_a_key_is_asked_for_and_kept_nowhere(open_page: Open, keyed_server: ServerProcess) -> None:
    page = open_page("/", of=keyed_server, refused=True)
    page.locator("#key-form").wait_for()
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    page.locator("#key-says", has_text="Incorrect API key").wait_for()
    page.fill("#key", KEY)
    page.get_by_role("button", name="Use this key").click()
    page.locator("#model", has_text="golden").wait_for()
    assert page.inner_text("#key-says") == ""
    embedded(page)
    for language in ("curl", "python", "javascript"):
        page.select_option("#language", language)
        code = page.inner_text("#code")
        assert "OPENAI_API_KEY" in code
        assert KEY not in code
    assert KEY not in page.content()
    kept = "[location.href, document.cookie, {...localStorage}, {...sessionStorage}]"
    assert KEY not in json.dumps(page.evaluate(kept))
    page.reload()
    page.locator("#key-form").wait_for()
    assert page.input_value("#key") == ""


def test_the_code_runs(open_page: Open, server: ServerProcess, tmp_path: Path) -> None:
    """In each language: its ranking is the page's."""
    page = open_page("/")
    page.fill("#passages", 'It\'s "noon"\n雪 ${HOME} `x` \\n\nThe canteen opens at noon.')
    embedded(page)
    texts = page.locator("#ranking .text").all_inner_texts()
    scores = page.locator("#ranking strong").all_inner_texts()
    ranking = [f"{score}  {text}" for score, text in zip(scores, texts, strict=True)]
    page.select_option("#language", "python")
    done = run([sys.executable, "-c", page.inner_text("#code")])
    assert done.splitlines() == ranking
    page.select_option("#language", "javascript")
    script = NODE / f"{tmp_path.name}.mjs"  # beside its packages
    script.write_text(page.inner_text("#code"))
    try:
        assert run(["node", str(script)]).splitlines() == ranking
    finally:
        script.unlink()
    page.select_option("#language", "curl")
    found = run(["bash", "-ec", page.inner_text("#code")])
    assert found.count('"object":"list"') == 2


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_can_be_copied(open_page: Open) -> None:
    page = embedded(open_page("/"))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    page.locator("#copied", has_text="copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == page.eval_on_selector("#code", "code => code.textContent")


WALK = ["docs", "query", "query-side", "passages", "passage-side", "Embed"]
RESULTS = ["matrix", "language", "copy", "code"]


def test_all_of_it_can_be_reached_and_used_by_keyboard(open_page: Open) -> None:
    page = open_page("/")
    page.locator("#model", has_text="nv-embed-small").wait_for()
    assert walk(page) == WALK
    page.focus("#query")
    page.keyboard.press("Control+a")
    page.keyboard.type("how long may I keep a book?")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")  # an instruction of mine
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "instruction"
    page.keyboard.press("Control+Enter")
    page.locator("#heat td").first.wait_for()
    assert page.locator("#ranking .text").first.inner_text().startswith("You can borrow books")
    assert walk(page) == [*WALK[:3], "instruction", *WALK[3:], *RESULTS]
    page.focus("#language")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#code").startswith("from openai import OpenAI")


def walk(page: Any) -> list[str]:
    """What Tab reaches from the top of the page to its end, each with a ring that is seen."""
    page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
    page.locator("h1").click()
    reached: list[str] = []
    for _ in range(30):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
                const it = document.activeElement;
                if (it === document.body) return null;
                const ring = getComputedStyle(it);
                const name = it.id || it.textContent.trim();
                return [name, ring.outlineStyle, ring.outlineWidth];
            }"""
        )
        if found is None:
            return reached
        assert found[1:] == ["solid", "3px"], found
        reached.append(found[0])
    raise AssertionError(f"no end: {reached}")
