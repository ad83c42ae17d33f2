"""A server as the model: batches, keys, refusals and waiting, against a server that misbehaves."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from model.errors import UnsupportedError
from model.training import remote
from model.training.endpoint import ATTEMPTS, RemoteError
from model.training.remote import ServerEmbedder, request_batches
from server import cli

KEY = "a-secret"
PREFIX = "Instruct: abc\nQuery: "
"""Of the task abc, as a server of another make is sent it."""


class FakeServer(BaseHTTPRequestHandler):
    """Answers with vectors [length of the text, length of the prompt or instruction], in reversed
    order; refuses as `refusals` says first: (status, headers)."""

    refusals: list[tuple[int, dict[str, str]]]
    requests: list[dict[str, object]]
    most_texts = 2048
    floats = False
    instructions: tuple[int, object] = (404, {"detail": "Not Found"})
    """What /v1/instructions answers: by default what a server of another make does."""

    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Bearer wrong":
            self._answer({"error": {"message": "Incorrect API key"}}, 401)
        elif self.path == "/v1/instructions":
            status, value = self.instructions
            self._answer(value, status)
        else:
            self._answer({"data": [{"id": "fake-embed"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append({**body, "key": self.headers["Authorization"]})
        if self.refusals:
            status, headers = self.refusals.pop(0)
            self._answer({"error": {"message": "try\nlater"}}, status, headers)
        elif len(body["input"]) > self.most_texts:
            self._answer({"error": {"message": "too large"}}, 413)
        else:
            rows = [
                {"index": index, "embedding": self._vector([len(text), self._length(body)])}
                for index, text in enumerate(body["input"])
            ]
            self._answer({"data": rows[::-1]})

    def _length(self, body: dict[str, str]) -> int:
        """Of what says how the texts are asked for."""
        return len(body["prompt"] if "prompt" in body else body["instruction"])

    def _vector(self, values: list[int]) -> object:
        if self.floats:
            return values
        return base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode()

    def _answer(
        self, value: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(value if isinstance(value, bytes) else json.dumps(value).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(
    refusals: list[tuple[int, dict[str, str]]] | None = None, **kind: object
) -> Iterator[tuple[str, type[FakeServer]]]:
    """A fresh fake server; its address, and its class with what it saw."""
    handler = type("Fake", (FakeServer,), {"refusals": refusals or [], "requests": [], **kind})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()


def expected(numbers: range, prompt: int) -> np.ndarray:
    rows = np.array([[n, prompt] for n in numbers], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("floats", [False, True])
def test_long_lists_go_in_batches_with_key_and_prompt(floats: bool) -> None:
    with serving(floats=floats) as (url, seen):
        embed = ServerEmbedder(f"{url}/v1/", api_key=KEY)
        rows = embed(["x" * n for n in range(1, 301)], "query", "abc")
    np.testing.assert_allclose(rows, expected(range(1, 301), len(PREFIX)), rtol=1e-6)
    assert [len(request["input"]) for request in seen.requests] == [256, 44]  # type: ignore[arg-type]
    assert {request["key"] for request in seen.requests} == {f"Bearer {KEY}"}
    assert {(r["model"], r["prompt"], r["truncate"]) for r in seen.requests} == {
        ("fake-embed", PREFIX, "END")
    }


def test_batches_are_cut_by_characters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BATCH_CHARS", 10)
    batches = list(request_batches(["aaaa", "bbbb", "cccc", "d" * 99, "e"]))
    assert batches == [["aaaa", "bbbb"], ["cccc"], ["d" * 99], ["e"]]


def test_it_waits_for_an_overloaded_server() -> None:
    waits: list[float] = []
    busy = [(429, {"retry-after-ms": "250", "retry-after": "1"}), (503, {"retry-after": "600"})]
    with serving([*busy, (429, {}), (429, {"retry-after": "Wed, 21 Oct 2026"})]) as (url, _):
        rows = ServerEmbedder(url, sleep=waits.append)(["xx"], "query", "abc")
    np.testing.assert_allclose(rows, expected(range(2, 3), len(PREFIX)), rtol=1e-6)
    assert waits == [0.25, 60, 4, 8]  # as asked, at most a minute, else doubling


def test_it_gives_up_in_the_end() -> None:
    with serving([(429, {"retry-after": "0"})] * 20) as (url, seen):
        embed = ServerEmbedder(url, sleep=lambda _: None)
        with pytest.raises(RemoteError, match=r"still overloaded after 8 tries \(try later\)"):
            embed(["x"], "query")
    assert len(seen.requests) == ATTEMPTS
    with serving([(504, {"x-should-retry": "false"})]) as (url, seen):
        embed = ServerEmbedder(url)
        with pytest.raises(RemoteError, match="answered 504: try later"):
            embed(["x"], "query")
    assert len(seen.requests) == 1


def test_a_request_too_large_is_halved_and_a_text_too_large_is_named() -> None:
    with serving(most_texts=2) as (url, seen):
        rows = ServerEmbedder(url)(["x" * n for n in range(1, 6)], "passage")
    np.testing.assert_allclose(rows, expected(range(1, 6), 0), rtol=1e-6)
    assert [len(r["input"]) for r in seen.requests] == [5, 2, 3, 1, 2]  # type: ignore[arg-type]
    with serving(most_texts=0) as (url, _):
        embed = ServerEmbedder(url)
        with pytest.raises(RemoteError, match=r"a single text is too large for it \(too large\)"):
            embed(["x", "y"], "passage")


def test_refusals_are_sentences_without_the_key() -> None:
    with serving([(400, {})]) as (url, _):
        with pytest.raises(RemoteError, match="answered 400: try later"):
            ServerEmbedder(url, api_key=KEY)(["x"], "query")
        with pytest.raises(RemoteError, match=r"wants a valid key: --api-key, or NV_") as error:
            ServerEmbedder(url, api_key="wrong")
        assert "wrong" not in str(error.value)
    with pytest.raises(RemoteError, match=r"does not answer as a server: .*refused"):
        ServerEmbedder(url)  # it has gone
    with pytest.raises(UnsupportedError, match="not an http address"):
        ServerEmbedder("file:///etc/passwd")


@pytest.mark.parametrize(
    "instructions",
    [
        (404, {"detail": "Not Found"}),
        (405, b""),
        (200, b"<!doctype html><title>Every path</title>"),
        (200, {"data": [{"task": "an older version's"}]}),
        (200, ["no object"]),
    ],
)
def test_a_server_of_another_make_is_sent_what_it_was_always_sent(
    instructions: tuple[int, object], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(instructions=instructions) as (url, seen):
        embed = ServerEmbedder(url)
        embed(["xx"], "query", "abc")
        embed(["xx"], "passage", "")
    common = {"model": "fake-embed", "input": ["xx"], "truncate": "END"}
    common |= {"encoding_format": "base64", "key": None}
    assert seen.requests == [{**common, "prompt": PREFIX}, {**common, "prompt": ""}]
    assert [record.getMessage() for record in caplog.records] == [
        f"{url} has no /v1/instructions: instructions are sent as `prompt` with NV-Embed's prefix, "
        "which the server may ignore"
    ]


def test_a_server_of_this_project_is_sent_side_and_task(caplog: pytest.LogCaptureFixture) -> None:
    e5 = {"family": "e5-mistral", "template": "Instruct: {task}\nQuery: "}
    with serving(instructions=(200, e5)) as (url, seen):
        embed = ServerEmbedder(url)
        embed(["xx"], "query", "abc")
        embed(["xx"], "passage")
    asked = [("query", "abc"), ("passage", "")]
    assert [(r["input_type"], r["instruction"]) for r in seen.requests] == asked
    assert not any("prompt" in request for request in seen.requests)
    assert not caplog.records


def test_a_family_without_a_template_is_sent_the_side_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(instructions=(200, {"family": "nemotron-3-embed", "template": None})) as (url, s):
        embed = ServerEmbedder(url)
        for side in ("query", "passage", "query"):
            embed(["xx"], side, "abc")
    assert [r["input_type"] for r in s.requests] == ["query", "passage", "query"]
    assert {r["instruction"] for r in s.requests} == {""}
    (record,) = caplog.records  # it is said once
    assert "a nemotron-3-embed model takes no instruction" in record.getMessage()


def test_a_server_that_cannot_say_its_family_now_is_not_taken_for_another() -> None:
    with (
        serving(instructions=(500, {"error": {"message": "out of order"}})) as (url, _),
        pytest.raises(RemoteError, match="answered 500: out of order"),
    ):
        ServerEmbedder(url)


def test_the_commands_take_the_key_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sts = tmp_path / "sts.jsonl"
    rows = [{"first": "x" * n, "second": "x" * n * n, "score": n} for n in range(1, 4)]
    sts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "keys").write_text("# of the server\nfrom-the-file\nanother\n")
    monkeypatch.setenv("NV_EMBED_API_KEY", KEY)
    with serving() as (url, seen):
        call = ["evaluate", "--url", url, "--sts"]
        assert cli.main([*call, f"{sts}=Find alike"]) == 0
        assert cli.main([*call, f"{sts}=", "--api-key", "mine"]) == 0
        monkeypatch.delenv("NV_EMBED_API_KEY")
        assert cli.main([*call, f"{sts}=", "--api-key-file", str(tmp_path / "keys")]) == 0
        assert cli.main([*call, f"{sts}=", "--api-key", "no\nheader"]) == 2  # nothing is sent
    prefix = "Instruct: Find alike\nQuery: "
    found = [(request["key"], request["prompt"]) for request in seen.requests]
    assert (
        found
        == [(f"Bearer {KEY}", prefix)] * 2
        + [("Bearer mine", "")] * 2
        + [("Bearer from-the-file", "")] * 2
    )
    assert KEY not in "".join(capsys.readouterr())
