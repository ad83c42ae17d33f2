"""The pages for people: served whole, closed when that is wished, open where keys are on.

What a browser makes of them is in tests/browser. What they compute runs here under node, where
there is one, and is compared with numpy's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.server.fakes import AppInProcess, in_process
from tests.server.processes import ROOT, ServerProcess

WEB = ROOT / "server/http/web"
PAGES = ("/", "/docs", "/redoc")


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint) as server:
        yield server


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_whole_by_itself(server: AppInProcess, path: str) -> None:
    answer = server.client.get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = answer.text
    assert page.startswith("<!doctype html>")
    assert not re.findall(r"https?:|\bsrc=|@import|url\(|import\(", page), "loaded from elsewhere"
    assert set(re.findall(r'href="([^"]*)"', page)) <= {"data:,", "docs", ".", "openapi.json"}
    assert server.client.head(path).headers["content-length"] == str(len(page.encode()))


@pytest.mark.parametrize("path", PAGES)
def test_the_policy_allows_what_is_on_the_page_and_nothing_else(
    server: AppInProcess, path: str
) -> None:
    answer = server.client.get(path)
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert policy[name] == f"'sha256-{digest}'"
    assert not re.findall(r"\bon\w+=|\bstyle=", answer.text), "the policy would not run these"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_base_url_still_embeds(server: AppInProcess) -> None:
    before = counted(server, "embeddings")
    assert server.client.get("/").status_code == 200
    assert counted(server, "embeddings") == before, "a page is no embedding"
    answer = server.client.post("/", json={"inputs": "a"})
    assert len(answer.json()) == 1, answer.text
    assert counted(server, "embeddings") == before + 1
    for path in ("/query", "/query/", "/passage/"):  # there the page's requests would go astray
        assert server.client.get(path).status_code == 404
        assert server.client.post(path, json={"inputs": "a"}).status_code == 200


def counted(server: AppInProcess, route: str) -> float:
    found = re.findall(
        rf'^nv_embed_requests_total{{route="{route}",status="200"}} (\S+)$',
        server.client.get("/metrics").text,
        re.MULTILINE,
    )
    return sum(map(float, found))


def test_either_page_can_be_closed(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, playground=False) as server:
        refused = server.client.get("/")
        assert refused.status_code == 404
        assert "POST /v1/embeddings; see also /v1/models" in refused.json()["error"]["message"]
        assert 'id="playground"' not in server.client.get("/docs").text, "a link to nowhere"
        assert server.client.post("/", json={"inputs": "a"}).status_code == 200
    with in_process(golden_checkpoint, docs=False) as server:
        assert server.client.get("/docs").status_code == 404
        assert 'id="docs"' not in server.client.get("/").text


def test_pages_are_open_where_keys_are_on_and_nothing_else_is(golden_checkpoint: Path) -> None:
    with in_process(golden_checkpoint, api_key=["secret"], root_path="/nv") as server:
        for path in (*PAGES, "/nv/", "/nv/docs"):
            assert server.client.get(path).status_code == 200, path
            assert server.client.post(path, json={"inputs": "a"}).status_code == 401, path
        for path in ("/openapi.json", "/info", "/v1/instructions"):
            assert server.client.get(path).status_code == 401, path
        assert server.client.get("/query/").status_code == 404


def run_in_node(expression: str, *scripts: str) -> object:
    """The value of an expression, after these scripts."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed; `make test-browser` runs the scripts in a browser")
    code = "\n".join((WEB / script).read_text() for script in scripts)
    command = [node, "-e", f"{code}\nconsole.log(JSON.stringify({expression}))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.process
@pytest.mark.parametrize(("count", "width"), [(2, 8), (7, 256), (40, 16)])
def test_similarities_ranking_and_map_are_numpys(count: int, width: int) -> None:
    vectors = np.random.default_rng(count).normal(size=(count, width)).astype("<f4")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    encoded = json.dumps([base64.b64encode(row.tobytes()).decode() for row in vectors])
    expression = f"""(() => {{
        const products = cosines({encoded}.map(decodeVector));
        return [products, ranking(products[0].slice(1)), principalMap(products)];
    }})()"""
    products, order, found = run_in_node(expression, "vectors.js")
    exact = vectors.astype(np.float64) @ vectors.T.astype(np.float64)
    np.testing.assert_allclose(products, exact, atol=1e-12)
    assert order == np.argsort(-exact[0, 1:], kind="stable").tolist()
    centred = vectors - vectors.astype(np.float64).mean(axis=0)
    axes, spreads, _ = np.linalg.svd(centred, full_matrices=False)
    expected = (axes * spreads)[:, :2]
    points = np.array(found["points"])
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-6)
    shares = spreads**2 / (spreads**2).sum()
    np.testing.assert_allclose(found["shares"], shares[:2], atol=1e-9)


@pytest.mark.process
def test_equal_texts_have_a_map_too() -> None:
    found = run_in_node("principalMap([[1, 1, 1], [1, 1, 1], [1, 1, 1]])", "vectors.js")
    assert found == {"points": [[0, 0]] * 3, "shares": [0, 0]}


@pytest.mark.process
def test_text_on_the_heat_map_can_be_read() -> None:
    expression = "Array.from({length: 101}, (_, i) => heatColours(i / 100))"
    cells = run_in_node(expression, "vectors.js")
    for cell in cells:
        red, green, blue = map(int, re.findall(r"\d+", cell["background"]))
        parts = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
                 for x in (red / 255, green / 255, blue / 255)]  # fmt: skip
        light = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
        contrast = 1.05 / (light + 0.05) if cell["ink"] == "#fff" else (light + 0.05) / 0.05
        assert contrast >= 4.5, cell


@pytest.mark.process
def test_a_page_finds_its_server_behind_a_proxys_prefix() -> None:
    paths = ["/", "/docs", "/redoc/", "/api", "/api/", "/api/docs", "/a/b/docs/", "/docsy"]
    code = json.dumps((WEB / "client.js").read_text() + "; return BASE")
    expression = f"""{json.dumps(paths)}.map((pathname) =>
        new Function("location", {code})({{origin: "o", pathname}}))"""
    bases = ["o", "o", "o", "o/api", "o/api", "o/api", "o/a/b", "o/docsy"]
    assert run_in_node(expression) == bases


ASKED = {
    "query": {"text": 'who said "it\'s" $HOME `x`?\\n', "fields": {"instruction": "Find é, 'or'"}},
    "passages": {
        "texts": ["it's", 'a "b" \\ c', "${x} $(touch y) 雪"],
        "fields": {"input_type": "passage"},
    },
}


@pytest.mark.process
def test_the_code_shown_makes_the_requests_that_were_made(
    hashing_server: ServerProcess, tmp_path: Path
) -> None:
    """Texts that a shell or a language could take for its own. JavaScript's: tests/browser."""
    url = f"{hashing_server.url}/v1"
    asked = {**ASKED, "url": url, "model": "golden-embed", "needsKey": False}
    expression = f"[SNIPPETS.curl({json.dumps(asked)}), SNIPPETS.python({json.dumps(asked)})]"
    curl, python = run_in_node(expression, "snippets.js")
    texts = ASKED["passages"]["texts"]
    query = hashing_server.vectors(input=[ASKED["query"]["text"]], **ASKED["query"]["fields"])
    passages = hashing_server.vectors(input=texts, **ASKED["passages"]["fields"])

    bash = shutil.which("bash")
    assert bash is not None
    if shutil.which("curl"):
        done = subprocess.run([bash, "-ec", curl], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        first, second = re.findall(r'\{"object":"list".*?"usage":\{.*?\}\}', done.stdout)
        for answer, expected in ((first, query), (second, passages)):
            rows = [item["embedding"] for item in json.loads(answer)["data"]]
            np.testing.assert_allclose(rows, expected, atol=1e-6)
        assert not list(tmp_path.iterdir()), "a text was run"

    pytest.importorskip("openai")
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = np.array(passages) @ query[0]
    lines = [f"{scores[i]:.3f}  {texts[i]}" for i in np.argsort(-scores)]
    assert done.stdout.splitlines() == lines
