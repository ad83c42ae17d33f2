"""Requests that go on while something is done to a server, and what became of each."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Self

import httpx

CONNECTIONS = 16


class Asking:
    """Asks for a vector, without a second try; says the status or the error. Of one event loop."""

    def __init__(self, url: str, *, connections: int, timeout: float) -> None:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits)

    async def __call__(self, number: int) -> str:
        try:
            answer = await self._client.post("/v1/embeddings", json={"input": f"text {number}"})
        except httpx.HTTPError as error:
            return type(error).__name__
        return f"{answer.status_code}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()


class SteadyLoad:
    """Connections that ask again and again, each when it has its answer, until the block ends. No
    two texts are equal. `seen`: how often each status or error came."""

    def __init__(self, url: str, *, pause: float, timeout: float = 60) -> None:
        """pause: seconds between two requests of a connection."""
        self._url, self._pause, self._timeout = url, pause, timeout
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()))
        self.seen: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _ask_all(self) -> None:
        await asyncio.gather(*map(self._connection, range(CONNECTIONS)))

    async def _connection(self, number: int) -> None:
        async with Asking(self._url, connections=1, timeout=self._timeout) as ask:
            while not self._stop.is_set():
                self.seen[await ask(number)] += 1
                number += CONNECTIONS
                await asyncio.sleep(self._pause)
