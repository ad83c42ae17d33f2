"""/docs and /redoc: the framework's pages, which say what they need."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from starlette.responses import HTMLResponse


def add_pages(app: FastAPI) -> None:
    """Both pages, which show the app's own document."""

    async def docs(request: Request) -> Response:
        schema = f"{app.root_path}/openapi.json"
        return _explained(get_swagger_ui_html(openapi_url=schema, title=app.title))

    async def redoc(request: Request) -> Response:
        schema = f"{app.root_path}/openapi.json"
        return _explained(get_redoc_html(openapi_url=schema, title=app.title))

    app.add_route("/docs", docs, include_in_schema=False)
    app.add_route("/redoc", redoc, include_in_schema=False)


def _explained(page: HTMLResponse) -> HTMLResponse:
    """The framework's page loads its scripts from elsewhere, and is blank without them."""
    words = (
        "This page needs scripts from cdn.jsdelivr.net, which did not load. The document itself, "
        'which needs none, is <a href="openapi.json">openapi.json</a>.'
    )
    show = "document.getElementById('no-scripts').hidden = false"
    html = bytes(page.body).decode()
    html = html.replace("<body>", f'<body><p id="no-scripts" hidden>{words}</p>', 1)
    html = html.replace("</body>", f"<noscript><p>{words}</p></noscript></body>", 1)
    html = html.replace('<script src="https:', f'<script onerror="{show}" src="https:', 1)
    return HTMLResponse(html)
