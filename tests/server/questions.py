"""Random requests whose right answers are known, and how to put them to a real server."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import httpx
import numpy as np

from model.tokenizer import NVEmbedTokenizer
from tests.server.processes import ServerProcess, usual_trust
from tests.server.runners import MARK, vector_of

RUNNERS = "tests.server.runners:"
WORDS = "a quick brown fox jumps over lazy dogs while nine wizards vex".split()  # noqa: SIM905


class Questions:
    """Random requests, with the ids that each of their inputs stands for."""

    def __init__(self, model: Path, seed: int) -> None:
        self._tokenizer = NVEmbedTokenizer.from_dir(model)
        self._random = random.Random(seed)

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, max_tokens=32_768).ids.tolist()

    def request(self) -> tuple[list[str] | list[list[int]], list[list[int]]]:
        """(the `input` to send, the ids of each of its inputs); mixed in length and size."""
        size = self._random.choice([1, 1, 1, 1, 2, 5, 17, 64])
        texts = []
        for _ in range(size):
            length = int(min(self._random.lognormvariate(2.5, 1.2), 600)) + 1
            texts.append(" ".join(self._random.choices(WORDS, k=length)))
        ids = [self.ids(text) for text in texts]
        return (ids if self._random.random() < 0.2 else texts), ids


def assert_answers(answer: httpx.Response, ids: list[list[int]]) -> None:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(ids)))
    got = np.array([item["embedding"] for item in data], dtype=np.float32)
    np.testing.assert_allclose(got, np.stack([vector_of(i) for i in ids]), rtol=0, atol=1e-6)
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, ids))


class _Connections(httpx.AsyncBaseTransport):
    """As many as there are requests at a time, each in a pool of its own: at each request httpx's
    looks through all its connections for each of them."""

    def __init__(self) -> None:
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        one = self._idle.pop() if self._idle else httpx.AsyncHTTPTransport(verify=usual_trust())
        try:
            answer = await one.handle_async_request(request)
            body = httpx.ByteStream(await answer.aread())
        except BaseException:
            await one.aclose()
            raise
        self._idle.append(one)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=body)

    async def aclose(self) -> None:
        for one in self._idle:
            await one.aclose()


def client_of(server: ServerProcess) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=60, transport=_Connections())


async def ask(client: httpx.AsyncClient, inputs: object) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": "golden-embed", "input": inputs})


def logged_batches(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


async def batches_logged(path: Path, count: int) -> None:
    """Wait until the runners have begun `count` batches."""
    async with asyncio.timeout(60):
        while len(logged_batches(path)) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def marked_ids() -> list[int]:
    return [1, MARK, 2]
