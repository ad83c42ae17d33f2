"""A chat endpoint that answers by its prompt alone: the same prompt, the same answer.

Of prompts for examples some get malformed answers, one in five; of all requests some are refused
first, once. Each answer names its prompt, so that a test can tell which answers a file holds.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MALFORMED = {
    "no JSON": "Here is an idea, but no object.",
    "refused": "I'm sorry, but I can't help with that.",
    "missing field": '{"query": "a question", "positive": "an answer"}',
    "empty text": '{"query": " ", "positive": "an answer", "negatives": ["another"]}',
    "equal texts": '{"query": "Same!", "positive": "same", "negatives": ["another"]}',
    "too long": json.dumps({"query": "q", "positive": "x" * 20_001, "negatives": ["n"]}),
    "not Unicode": '{"query": "q \\ud83d", "positive": "p", "negatives": ["n"]}',
    "cut off": '{"query": "a question", "posi',
}
"""Reason -> an answer that is malformed for it."""


def number_of(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big")


def answer_to(prompt: str) -> tuple[str, str]:
    """Text and finish_reason."""
    number = number_of(prompt)
    mark = f"<think>{number}</think>"
    if "JSON array" in prompt:
        # Few topics: tasks repeat one another, in another case.
        names = [f"topic {(number + place) % 97}" for place in range(10)]
        tasks = [f"Given a {'REMARK' if number % 2 else 'remark'}, find its {n}." for n in names]
        return mark + json.dumps(tasks), "stop"
    if number % 5 == 0:
        reason = list(MALFORMED)[number // 5 % len(MALFORMED)]
        return mark + MALFORMED[reason], "length" if reason == "cut off" else "stop"
    subject = f"thing {number % 100}"
    row = {
        "query": f"where is {subject}?",
        "positive": f"You will find {subject} here, says {number}.",
        "negatives": [f"Nobody knows {number}.", f"{number} is elsewhere."],
    }
    return f"{mark}Certainly!\n```json\n{json.dumps(row)}\n```", "stop"


class FakeChat(BaseHTTPRequestHandler):
    """`asked`, `served`: how often each prompt came, and was answered."""

    asked: Counter[str]
    served: Counter[str]
    refused: set[str]
    lock: threading.Lock
    key: str | None = None
    pause_s = 0.0
    refuses_after = 10**9
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        if self.key and self.headers["Authorization"] != f"Bearer {self.key}":
            self._answer({"error": {"message": "Incorrect API key"}}, 401)
        else:
            self._answer({"data": [{"id": "fake-chat"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        if body["model"] != "fake-chat":
            return self._answer({"error": {"message": "no such model"}}, 404)
        if number_of(prompt) % 7 == 0:
            with self.lock:
                first = prompt not in self.refused
                self.refused.add(prompt)
            if first:
                status = 429 if number_of(prompt) % 2 else 500
                return self._answer({"error": {"message": "later"}}, status)
        with self.lock:
            self.asked[prompt] += 1
        if sum(self.asked.values()) > self.refuses_after:
            return self._answer({"error": {"message": "Incorrect API key"}}, 401)
        time.sleep(self.pause_s)
        text, finish = answer_to(prompt)
        with self.lock:
            self.served[prompt] += 1
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
        return self._answer(
            {"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
        )

    def _answer(self, value: object, status: int = 200) -> None:
        try:
            self.send_response(status)
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())
        except (BrokenPipeError, ConnectionResetError):
            pass  # whoever asked was killed

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients that were killed."""


@contextmanager
def serving(**kind: object) -> Iterator[tuple[str, type[FakeChat]]]:
    """A fresh server; its address, and its class with what it saw."""
    state = {"asked": Counter(), "served": Counter(), "refused": set()}
    state |= {"lock": threading.Lock(), **kind}
    handler = type("Fake", (FakeChat,), state)
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()
