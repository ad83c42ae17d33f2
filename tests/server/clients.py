"""What a test asks of a server, whether that is a process or the app in this one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import httpx

PATIENCE_S = 60.0


class Asking:
    """Its subclasses say how the server is reached and where its log is."""

    client: httpx.Client
    url: str

    @property
    def log(self) -> str:
        raise NotImplementedError

    def wait_until(self, predicate: Callable[[], bool], what: str) -> None:
        """Poll until `predicate` holds; fails with the log when it does not in time."""
        deadline = time.monotonic() + PATIENCE_S
        while not predicate():
            if time.monotonic() > deadline:
                raise AssertionError(f"not {what} after {PATIENCE_S} s:\n{self.log}")
            time.sleep(0.02)

    def wait_for_metric(self, name: str, value: float) -> None:
        self.wait_until(lambda: self.metric(name) == value, f"{name} = {value}")

    def metric(self, name: str) -> float:
        """The value of a metric, with or without its labels; without them the sum of its series."""
        text = self.client.get("/metrics").text
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))

    def embed(self, **fields: object) -> httpx.Response:
        """POST /v1/embeddings to the model by its checkpoint folder's name."""
        return self.client.post("/v1/embeddings", json={"model": "golden-embed", **fields})

    def vectors(self, **fields: object) -> list[list[float]]:
        answer = self.embed(**fields)
        assert answer.status_code == 200, answer.text
        return [item["embedding"] for item in answer.json()["data"]]
