"""The pages for people: the playground at /, the interface at /docs and /redoc.

Each is one HTML file by itself, joined at the start from the parts in `web/`: nothing is loaded
from elsewhere, and the browser is told so (Content-Security-Policy). Knows nothing of models: the
pages ask the server's own routes, with a key where one is needed; they themselves need none.
"""

from __future__ import annotations

import base64
import hashlib
from http import HTTPStatus
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from server.api.request_context import context_of

PLAYGROUND_PATH = "/"
DOCS_PATHS = ("/docs", "/redoc")
_COUNTED_AS = "/playground"
_WEB = Path(__file__).with_name("web")
_LINKS = {
    "playground": '<a id="playground" href=".">Playground</a>',
    "docs": '<a id="docs" href="docs">Interface (docs)</a>',
}
_SCRIPTS = {
    "playground": ("vectors.js", "snippets.js", "client.js", "playground.js"),
    "docs": ("client.js", "docs.js"),
}


def add_pages(app: FastAPI, *, docs: bool, playground: bool) -> frozenset[str]:
    """Add those that are wanted. Returns their paths, which may be read without a key."""
    wanted = {"docs": docs, "playground": playground}
    left_out = [link for name, link in _LINKS.items() if not wanted[name]]
    paths: list[str] = []
    if playground:
        page = _Page("playground", left_out)

        async def show(request: Request) -> Response:
            context = context_of(request.scope)
            if context.side is not None:  # /query/ is a base URL for clients, not this page's
                raise HTTPException(HTTPStatus.NOT_FOUND)
            context.route_path = _COUNTED_AS  # a POST there embeds: the page is not among these
            return page.response()

        app.add_route(PLAYGROUND_PATH, show, include_in_schema=False)
        paths.append(PLAYGROUND_PATH)
    if docs:
        interface = _Page("docs", left_out)

        async def show_docs(request: Request) -> Response:
            return interface.response()

        for path in DOCS_PATHS:
            app.add_route(path, show_docs, include_in_schema=False)
        paths += DOCS_PATHS
    return frozenset(paths)


class _Page:
    """One page: its bytes, and what a browser may do for it."""

    def __init__(self, name: str, left_out: list[str]) -> None:
        html = _part(f"{name}.html").replace("  <key-form></key-form>\n", _part("key_form.html"))
        for link in left_out:
            html = html.replace(link, "")
        style = _part("style.css")
        script = "\n".join(_part(part) for part in _SCRIPTS[name])
        html = html.replace("<style></style>", f"<style>{style}</style>")
        self._body = html.replace("<script></script>", f"<script>{script}</script>").encode()
        self._headers = {
            "content-security-policy": "; ".join(
                (
                    "default-src 'none'",
                    f"script-src '{_digest(script)}'",
                    f"style-src '{_digest(style)}'",
                    "img-src data:",  # the empty icon, or browsers ask for /favicon.ico
                    "connect-src 'self'",
                    "base-uri 'none'",
                    "form-action 'none'",
                    "frame-ancestors 'none'",
                )
            ),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }

    def response(self) -> Response:
        return Response(self._body, headers=self._headers, media_type="text/html")


def _part(name: str) -> str:
    return (_WEB / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """As a policy names the one inline script or style that it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
