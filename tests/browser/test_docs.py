"""The interface's page in a browser: complete, and its requests work."""

from __future__ import annotations

from tests.browser.conftest import KEY, Open
from tests.server.processes import ServerProcess


def test_each_route_field_and_status_is_there(open_page: Open, server: ServerProcess) -> None:
    document = server.client.get("/openapi.json").json()
    for path in ("/docs", "/redoc"):
        page = open_page(path)
        page.locator("summary").first.wait_for()
        shown = page.locator("#routes").text_content()
        expected = [
            f"{method.upper()}{route}"
            for route, methods in document["paths"].items()
            for method in methods
        ]
        assert page.locator("summary").all_text_contents() == expected
        for route, methods in document["paths"].items():
            for operation in methods.values():
                assert operation["description"] in shown, route
                for status, answer in operation["responses"].items():
                    assert f"{status}{answer['description']}" in shown
        for name in ("EmbeddingsRequest", "TokenizeRequest"):
            for field, schema in document["components"]["schemas"][name]["properties"].items():
                assert field in shown
                assert schema.get("description", "") in shown
        assert page.locator("td", has_text="undefined").count() == 0
        assert page.locator("td", has_text="object Object").count() == 0


def test_a_request_can_be_tried(open_page: Open, server: ServerProcess) -> None:
    page = open_page("/docs", refused=True)
    page.locator("summary", has_text="/v1/embeddings").click()
    form = page.get_by_role("form", name="POST /v1/embeddings")
    form.get_by_role("button", name="Send").click()
    answer = form.locator("pre")
    answer.wait_for()
    fingerprint = server.embed(model="nv-embed-small", input="a").headers["x-nv-embed-fingerprint"]
    assert f"x-nv-embed-fingerprint: {fingerprint}" in answer.inner_text()
    assert '"prompt_tokens"' in answer.inner_text()
    form.get_by_label("Body").fill('{"input": 1.5}')
    form.get_by_role("button", name="Send").click()
    form.get_by_role("status").filter(has_text="400").wait_for()
    page.locator("summary", has_text="/v1/models/{model_id}").click()
    form = page.get_by_role("form", name="GET /v1/models/{model_id}")
    form.get_by_label("model_id").fill("nv-embed-small-query")
    form.get_by_role("button", name="Send").click()
    form.locator("pre", has_text='"id": "nv-embed-small-query"').wait_for()


def test_a_key_is_asked_for(open_page: Open, keyed_server: ServerProcess) -> None:
    page = open_page("/docs", of=keyed_server, refused=True)
    page.locator("#key-form").wait_for()
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    page.locator("summary").first.wait_for()


def test_the_pages_lead_to_each_other(open_page: Open) -> None:
    page = open_page("/docs")
    page.get_by_role("link", name="Playground").click()
    page.get_by_role("heading", name="Ranking").wait_for()
    page.get_by_role("link", name="Interface").click()
    page.locator("summary").first.wait_for()
