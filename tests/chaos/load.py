"""Clients that cost little: HTTP/1.1 on bare asyncio, and the loads that are made of them.

`python -m tests.chaos.load OPTIONS` (JSON, see `Load`) loads a server from a process of its own and
prints one line of JSON, so that the clients' interpreter is not the one that is measured with.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import httptools
import numpy as np
import orjson
import uvloop

from model.tokenizer import NVEmbedTokenizer
from tests.server.processes import ROOT, ServerProcess
from tests.server.runners import vector_of

PROBE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
METRICS = PROBE.replace(b"livez", b"metrics")
TICK_S = 0.002


@dataclass(slots=True)
class Answer:
    """What came back; `status` 0 when the connection ended before an answer was whole."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    seconds: float


def post(body: bytes, *headers: str) -> bytes:
    """The bytes of an embeddings request."""
    lines = ["POST /v1/embeddings HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Connection(asyncio.Protocol):
    """One connection, one request at a time; `open` until either side ends it."""

    def __init__(self) -> None:
        self.open = False
        self.opened = time.monotonic()
        self.transport: asyncio.Transport | None = None
        self._pending: asyncio.Future[Answer] | None = None

    @classmethod
    async def to(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    def ask(self, request: bytes) -> asyncio.Future[Answer]:
        """Send; the future always gets an Answer."""
        assert self.transport is not None
        self._begin()
        self._pending = asyncio.get_running_loop().create_future()
        self._sent = time.monotonic()
        self.transport.write(request)
        return self._pending

    def close(self) -> None:
        self.open = False
        if self.transport is not None:
            self.transport.close()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []

    # asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods, not the base class.
        self.transport, self.open = cast(asyncio.Transport, transport), True

    def data_received(self, data: bytes) -> None:
        if self._pending is not None:
            self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._finish(0)

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.open = self._parser.should_keep_alive()
        self._finish(self._parser.get_status_code())

    def _finish(self, status: int) -> None:
        if self._pending is not None and not self._pending.done():
            seconds = time.monotonic() - self._sent
            self._pending.set_result(Answer(status, self._headers, b"".join(self._body), seconds))
        self._pending = None


@dataclass
class Load:
    """What to do to a server that runs one of `tests.server.runners`. `rate` in requests a second;
    0: each connection asks again as soon as it has its answer. A number is put before each text, so
    that no two are equal: equal ones in flight are computed once."""

    host: str
    port: int
    checkpoint: str  # whose tokenizer tells which vectors are right
    texts: list[list[str]]  # of each request, in turn
    model: str
    seconds: float
    settle: float = 1.0  # seconds at the start that count for nothing
    rate: float = 0.0
    connections: int = 32  # of the closed loop
    probes_per_s: float = 100.0  # of GET /livez, beside an open loop


@dataclass
class _Seen:
    statuses: Counter[int] = field(default_factory=Counter)
    answers: list[tuple[int, bytes]] = field(default_factory=list)  # request's number, body
    bad_refusals: int = 0  # 429s without both headers
    refusal_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    probe_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)  # how late this process sent a request


class Loader:
    """One run of a Load."""

    def __init__(self, load: Load) -> None:
        self._load, self._seen = load, _Seen()
        self._idle: list[Connection] = []
        self._from = 0.0

    async def run(self) -> dict[str, Any]:
        load = self._load
        begin = time.monotonic()
        self._from, until = begin + load.settle, begin + load.seconds
        counting = asyncio.create_task(self._count_inputs(until))
        if load.rate:
            await self._open_loop(begin, until)
        else:
            loops = (self._closed_loop(index, until) for index in range(load.connections))
            await asyncio.gather(*loops)
        for connection in self._idle:
            connection.close()
        return {"inputs_per_s": await counting, **self._summary()}

    async def _exchange(self, request: bytes) -> Answer:
        """On a connection that is idle, or a new one."""
        while self._idle and not self._idle[-1].open:
            self._idle.pop()
        try:
            connection = (
                self._idle.pop()
                if self._idle
                else await Connection.to(self._load.host, self._load.port)
            )
        except OSError:
            return Answer(0, {}, b"", 0.0)
        answer = await connection.ask(request)
        if connection.open:
            self._idle.append(connection)
        return answer

    async def _ask(self, index: int) -> None:
        body = json.dumps({"model": self._load.model, "input": self._inputs(index)})
        answer = await self._exchange(post(body.encode()))
        seen = self._seen
        seen.statuses[answer.status] += 1
        if answer.status == 200:
            seen.answer_s.append(answer.seconds)
            seen.answers.append((index, answer.body))
        elif answer.status == 429:
            if time.monotonic() >= self._from:
                seen.refusal_s.append(answer.seconds)
            headers = answer.headers
            seen.bad_refusals += not (
                headers.get(b"retry-after", b"").isdigit()
                and headers.get(b"retry-after-ms", b"").isdigit()
                and json.loads(answer.body)["error"]["code"] == "rate_limit_exceeded"
            )

    def _inputs(self, index: int) -> list[str]:
        """The texts of request number `index`; all numbers have the same count of digits."""
        texts = self._load.texts
        return [f"{1_000_000 + index} {text}" for text in texts[index % len(texts)]]

    def _wrong(self) -> int:
        """Answers that are not the vectors of their own texts."""
        tokenizer = NVEmbedTokenizer.from_dir(Path(self._load.checkpoint))
        wrong = 0
        for index, body in self._seen.answers:
            found = [item["embedding"] for item in orjson.loads(body)["data"]]
            expected = [
                vector_of(tokenizer.encode(text, max_tokens=2**15).ids)
                for text in self._inputs(index)
            ]
            wrong += np.shape(found) != np.shape(expected) or not np.allclose(found, expected)
        return wrong

    async def _closed_loop(self, index: int, until: float) -> None:
        while time.monotonic() < until:
            await self._ask(index)
            index += self._load.connections

    async def _open_loop(self, begin: float, until: float) -> None:
        """Requests and probes are sent when it is time, whatever has become of earlier ones: a
        stall meets as large a share of the ones as of the others."""
        load, tasks = self._load, []
        sent = probes = 0
        while (now := time.monotonic()) < until:
            while (due := begin + sent / load.rate) <= now:
                if due >= self._from:
                    self._seen.late_s.append(time.monotonic() - due)
                tasks.append(asyncio.create_task(self._ask(sent)))
                sent += 1
            while begin + probes / load.probes_per_s <= now:
                tasks.append(asyncio.create_task(self._probe()))
                probes += 1
            await asyncio.sleep(TICK_S)
        await asyncio.gather(*tasks)

    async def _count_inputs(self, until: float) -> float:
        """Inputs a second that the server embeds in the time that counts, by its own count."""
        counts = []
        for moment in (self._from, until):
            await asyncio.sleep(moment - time.monotonic())
            text = (await self._exchange(METRICS)).body.decode()
            match = re.search(r"^nv_embed_inputs_total (\S+)$", text, re.MULTILINE)
            assert match is not None
            counts.append((time.monotonic(), float(match[1])))
        (begin, before), (end, after) = counts
        return round((after - before) / (end - begin), 1)

    async def _probe(self) -> None:
        answer = await self._exchange(PROBE)
        assert answer.status == 200, answer
        if time.monotonic() >= self._from:
            self._seen.probe_s.append(answer.seconds)

    def _summary(self) -> dict[str, Any]:
        seen, seconds = self._seen, self._load.seconds - self._load.settle
        return {
            "statuses": {str(status): count for status, count in seen.statuses.items()},
            "wrong": self._wrong(),
            "bad_refusals": seen.bad_refusals,
            "sent_per_s": round(len(seen.late_s) / seconds, 1),
            **{
                name: percentiles(getattr(seen, name))
                for name in ("answer_s", "refusal_s", "probe_s", "late_s")
            },
        }


def address(server: ServerProcess) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p90, p99 and max of some seconds, in milliseconds."""
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    numbers = {"p50": p50, "p90": p90, "p99": p99, "max": max(values)}
    return {"count": len(values)} | {key: round(1000 * float(v), 2) for key, v in numbers.items()}


def start_load(load: Load) -> subprocess.Popen[str]:
    """Run it in a process of its own; `finish_load` gives its summary."""
    command = [sys.executable, "-m", "tests.chaos.load", json.dumps(asdict(load))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish_load(process: subprocess.Popen[str], timeout: float = 120) -> dict[str, Any]:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, process.returncode
    summary: dict[str, Any] = json.loads(output)
    return summary


def rss_bytes(pid: int) -> int:
    """Resident memory that is the process's own: file mappings left out."""
    status = Path(f"/proc/{pid}/status").read_text()
    lines = (line.split() for line in status.splitlines())
    return 1024 * next(int(words[1]) for words in lines if words[0] == "RssAnon:")


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(Loader(Load(**json.loads(sys.argv[1]))).run())))
