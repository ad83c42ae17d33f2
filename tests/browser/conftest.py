"""A real server and a headless Chromium that reaches nothing else: for `make test-browser` alone.

Without CHROMIUM, which that target sets, nothing is collected here. With it a missing tool fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.processes import ServerProcess, serving

CHROMIUM = os.environ.get("CHROMIUM")
KEY = "a-key-of-the-tests"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
_REFUSALS = ("Failed to load resource", "Executing inline", "Connecting to", "Fetch API")
collect_ignore_glob = [] if CHROMIUM else ["test_*.py"]

Open = Callable[..., Any]
"""Path, and perhaps server, size and scheme -> playwright's page, once it has settled."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The default model."""
    server = ServerProcess(None, log=tmp_path_factory.mktemp("server") / "log").wait_ready()
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture(scope="session")
def keyed_server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """One that asks for a key."""
    folder = tmp_path_factory.mktemp("keyed_server")
    (folder / "keys.txt").write_text(KEY)
    with serving(
        golden_checkpoint, "--api-key-file", str(folder / "keys.txt"), log=folder / "log"
    ) as server:
        yield server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",  # CI runs as root, which Chromium's sandbox refuses
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, server: ServerProcess) -> Iterator[Open]:
    """At its end: no page asked anybody but its server, none wrote an error."""
    with ExitStack() as pages:

        def open_one(
            path: str,
            *,
            of: ServerProcess = server,
            size: str = "desktop",
            scheme: str = "light",
            refused: bool = False,
        ) -> Any:
            """refused: the server refuses some requests, or the page's policy does; the browser
            logs that."""
            page = pages.enter_context(watched(chromium, of, size, scheme, refused))
            page.goto(of.url + path)
            return page

        yield open_one


@contextmanager
def watched(
    chromium: Any, server: ServerProcess, size: str, scheme: str, refused: bool
) -> Iterator[Any]:
    width, height = SIZES[size]
    context = chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        has_touch=size == "phone",
        is_mobile=size == "phone",
    )
    asked: list[str] = []
    errors: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    yield page
    context.close()
    assert asked, "no request was seen: nothing was checked"
    elsewhere = [url for url in asked if not url.startswith((f"{server.url}/", "data:"))]
    assert not elsewhere, elsewhere
    if refused:
        errors = [said for said in errors if not said.startswith(_REFUSALS)]
    assert not errors, errors


def embedded(page: Any) -> Any:
    """The playground with the results of its own texts."""
    page.get_by_role("button", name="Embed").click()
    page.locator("#heat td").first.wait_for()
    return page
