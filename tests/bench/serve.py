"""Texts/s, tokens/s and latency of a real server under load, against the packed forward alone.

Closed loop: single texts on 32 connections, and 64 texts a request on 4 (the shares of one fixed
list of different texts); then lone texts, one after another on one connection. The bound is the
packed forward of the same texts by the offline Encoder with as many threads, and the forwards of
the lone texts, once warmed up. All these run in turns, several rounds, the server idle while the
forward runs; of each the fastest counts (of each lone text, too), since whatever else the machine
does slows them; what the rounds give when each is taken by itself is printed, too.

Open loop: requests arrive at random (Poisson) at a share of the rate that the closed loop reached,
and latency counts from the moment at which a request was due, so that a slow server cannot hide.
Last, a request of very many inputs alone, for the time of a full batch, and single queries at
random moments beside one such request after another: a query may wait for the batch at work and
for its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from model.platform import resources
from model.tokenizer import NVEmbedTokenizer
from tests.bench import report, workloads
from tests.server.processes import ROOT, ServerProcess

_BOUND = """
import json, os, sys, time
from model.encoder import Encoder
folder, dtype, quantization, threads, file, lone_texts = sys.argv[1:]
os.nice(5)  # as the worker, so that other work on the machine holds both up alike
encoder = Encoder(folder, dtype=dtype, quantization=quantization, threads=int(threads))
encoder.runner.warm_up()
texts = json.load(open(file))
for _ in range(2):  # the first is the warm-up: the server has seen each text, too
    started = time.perf_counter()
    encoder.encode(texts, progress=False)
    all_of_them = time.perf_counter() - started
    lone = []
    for text in texts[:int(lone_texts)]:
        encoding = encoder.tokenizer.encode(text, max_tokens=1 << 15)
        started = time.perf_counter()
        encoder.runner.embed([encoding])
        lone.append(time.perf_counter() - started)
print(json.dumps([all_of_them, lone]))
"""
LONE_TEXTS = 200
LONE = "one after another, each text's least"


class Client:
    """One keep-alive connection that posts JSON, with next to no work of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def to(cls, url: str) -> AsyncIterator[Client]:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 22)
        try:
            yield cls(reader, writer)
        finally:
            writer.close()

    async def post(self, path: str, body: bytes) -> bytes:
        """The body of a 200; anything else is an error."""
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        if b"content-length: " in answer:
            length = int(answer.split(b"content-length: ")[1].split(b"\r\n")[0])
            content = await self._reader.readexactly(length)
        else:
            content = await self._chunks()
        assert answer.startswith(b"http/1.1 200"), (answer, content[:500])
        return content

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self._reader.readline(), 16):
            parts.append(await self._reader.readexactly(size))
            await self._reader.readline()
        await self._reader.readline()
        return b"".join(parts)


def body_of(texts: Sequence[str], model: str) -> bytes:
    return orjson.dumps({"model": model, "input": texts, "encoding_format": "base64"})


async def closed_loop(
    url: str, path: str, bodies: Sequence[bytes], connections: int
) -> tuple[float, list[float]]:
    """Each connection sends its next request when it has the answer to the last one.
    -> (seconds in all, latency of each request)."""
    waiting, latencies = list(reversed(bodies)), []

    async def work() -> None:
        async with Client.to(url) as client:
            while waiting:
                body, started = waiting.pop(), time.perf_counter()
                await client.post(path, body)
                latencies.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(connections)))
    return time.perf_counter() - started, latencies


async def open_loop(
    url: str, path: str, bodies: Sequence[bytes], per_second: float
) -> tuple[float, list[float]]:
    """Requests at random moments, whatever becomes of the earlier ones."""
    generator = random.Random(8)
    idle: list[Client] = []
    latencies: list[float] = []
    connections: list[Any] = []

    async def one(body: bytes, due: float) -> None:
        if not idle:
            connection = Client.to(url)
            connections.append(connection)
            idle.append(await connection.__aenter__())
        client = idle.pop()
        await client.post(path, body)
        latencies.append(time.perf_counter() - due)
        idle.append(client)

    started = due = time.perf_counter()
    tasks = []
    for body in bodies:
        due += generator.expovariate(per_second)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(body, due)))
    await asyncio.gather(*tasks)
    seconds = time.perf_counter() - started
    for connection in connections:
        await connection.__aexit__(None, None, None)
    return seconds, latencies


async def beside_bulk(
    url: str, path: str, bulk: bytes, bodies: Sequence[bytes], every: float
) -> list[float]:
    """Latencies of single queries beside one bulk request after another; between an answer and
    the next query are `every` seconds in the mean, at random, since each answer ends a batch."""
    generator = random.Random(8)

    async def flood() -> None:
        async with Client.to(url) as client:
            while True:
                await client.post(path, bulk)

    flooding = asyncio.create_task(flood())
    await asyncio.sleep(0.5)
    latencies = []
    async with Client.to(url) as client:
        for body in bodies:
            started = time.perf_counter()
            await client.post(path, body)
            latencies.append(time.perf_counter() - started)
            await asyncio.sleep(generator.uniform(0, 2 * every))
    flooding.cancel()
    with suppress(asyncio.CancelledError):
        await flooding
    return latencies


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--model", default="small", help="small, trunk, golden, or a folder")
    parser.add_argument("--mix", default="lognormal", choices=workloads.MIXES)
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--threads", type=int, default=resources.usable_cores())
    parser.add_argument("--rounds", type=int, default=5, help="of the forward and the closed loops")
    parser.add_argument("--loads", default="0.5,0.8", help="of the open loop")
    parser.add_argument("--queries", type=int, default=200, help="beside the bulk request")
    parser.add_argument("--bulk-inputs", type=int, default=2048)
    options = parser.parse_args(arguments)
    out = report.Report("serve", __doc__ or "", report.settings_of(options))
    out.start()
    folder = workloads.checkpoint(options.model, options.scratch)
    tokenizer = NVEmbedTokenizer.from_dir(folder)
    texts = workloads.texts_of(tokenizer, options.mix, options.texts)
    tokens = sum(len(tokenizer.encode(text, max_tokens=1 << 15)) for text in texts)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "texts.json"
        file.write_text(json.dumps(texts))
        server = ServerProcess(
            folder,
            *("--dtype", options.dtype, "--quantization", options.quantization),
            *("--threads", str(options.threads)),
            log=Path(scratch) / "log",
        )
        try:
            server.wait_ready()
            measuring = _Measuring(out, server, texts, tokens)
            bound = measuring.closed(options.rounds, lambda: forward_alone(folder, file, options))
            measuring.open([float(share) for share in options.loads.split(",")])
            if options.queries:
                measuring.beside_bulk(options.queries, options.bulk_inputs)
        finally:
            server.stop()
    out.raw["packed forward alone"] = bound
    seconds = [f.whole for f in bound]
    for name, runs in out.raw.items():
        if name.startswith("closed"):
            loads = [run["seconds"] for run in runs]
            shares = [s / load for s, load in zip(seconds, loads, strict=True)]
            out.ratios[f"{name} / packed forward"] = min(seconds) / min(loads)
            out.ratios[f"{name} / packed forward, median of rounds"] = report.median(shares)
    lone, forwards = out.raw[LONE], [f.lone for f in bound]
    out.add(load="the forwards of those", p50_ms=_p50_of_least(forwards) * 1000)
    name = "p50 of a lone text less its forward, ms"
    out.ratios[name] = (_p50_of_least(lone) - _p50_of_least(forwards)) * 1000
    more = [report.median(a) - report.median(b) for a, b in zip(lone, forwards, strict=True)]
    out.ratios[f"{name}, median of rounds"] = report.median(more) * 1000
    out.add(
        load="packed forward alone",
        texts_per_s=len(texts) / min(seconds),
        tokens_per_s=tokens / min(seconds),
    )
    for row in out.rows:
        row["model"] = f"{options.model} {options.dtype} {options.quantization}"
    out.finish(options.results, group="model", label="load", value="texts_per_s", unit="texts/s")


class Forward(NamedTuple):
    """Seconds of the packed forward alone."""

    whole: float  # of all texts, packed
    lone: list[float]  # of each of the first texts, alone


class _Measuring:
    """Loads a server and adds to the report what it saw."""

    def __init__(
        self, out: report.Report, server: ServerProcess, texts: Sequence[str], tokens: int
    ) -> None:
        self._out, self._server, self._texts, self._tokens = out, server, texts, tokens
        self._to = server.url, "/v1/embeddings"
        self._model = server.client.get("/v1/models").json()["data"][0]["id"]
        self._limit = server.client.get("/info").json()["limits"]["max_batch_tokens"][0]
        self._single = [body_of([text], self._model) for text in texts]
        self._many = [body_of(texts[i : i + 64], self._model) for i in range(0, len(texts), 64)]
        asyncio.run(closed_loop(*self._to, self._single[:64], 8))  # warm-up

    def closed(self, rounds: int, forward: Callable[[], Forward]) -> list[Forward]:
        """Closed loops and lone texts, in turns with the forward alone; of each load its fastest
        round."""
        loads = {
            "closed, 32 x 1 text": lambda: closed_loop(*self._to, self._single, 32),
            "closed, 4 x 64 texts": lambda: closed_loop(*self._to, self._many, 4),
        }
        bound: list[Forward] = []
        lone: list[list[float]] = []
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in loads}
        for number in range(rounds):
            bound.append(forward())
            for name, load in loads.items():
                runs[name].append(self._run(name, load))
            lone.append(asyncio.run(closed_loop(*self._to, self._single[:LONE_TEXTS], 1))[1])
            print(f"measured: closed loops, round {number + 1} of {rounds}", flush=True)
        for rows in runs.values():
            self._out.add(**max(rows, key=lambda row: row["texts_per_s"]))
        self._out.add(load=LONE, p50_ms=_p50_of_least(lone) * 1000)
        self._out.raw[LONE] = lone
        return bound

    def open(self, shares: Sequence[float]) -> None:
        """Open loops at these shares of the rate of single texts, the report's first row."""
        reached = self._out.rows[0]["texts_per_s"]
        for share in shares:
            name, rate = f"open, {share:.0%} of closed", share * reached
            row = self._run(name, lambda rate=rate: open_loop(*self._to, self._single, rate))  # type: ignore[misc]
            self._out.add(**row)
            print(f"measured: {name}", flush=True)

    def _run(
        self, name: str, load: Callable[[], Coroutine[Any, Any, tuple[float, list[float]]]]
    ) -> dict[str, Any]:
        before = _batches(self._server)
        seconds, latencies = asyncio.run(load())
        count, filled = (b - a for a, b in zip(before, _batches(self._server), strict=True))
        raw = {"seconds": seconds, "latencies": [round(x, 5) for x in latencies]}
        self._out.raw.setdefault(name, []).append(raw)
        return {
            "load": name,
            "texts_per_s": len(self._texts) / seconds,
            "tokens_per_s": self._tokens / seconds,
            **_latency(latencies),
            "batch_fill": filled / count / self._limit,
        }

    def beside_bulk(self, queries: int, bulk_inputs: int) -> None:
        texts = [f"{text} {i}" for i, text in enumerate(islice(cycle(self._texts), bulk_inputs))]
        bodies = [body_of([f"query number {i} of them"], self._model) for i in range(queries)]
        bulk = body_of(texts, self._model)
        before = self._batch_seconds(), _batches(self._server)[1]
        asyncio.run(closed_loop(*self._to, [bulk], 1))  # alone, for the time of a full batch
        after = self._batch_seconds(), _batches(self._server)[1]
        seconds, tokens = (b - a for a, b in zip(before, after, strict=True))
        full_batch = seconds / tokens * self._limit
        latencies = asyncio.run(beside_bulk(*self._to, bulk, bodies, every=0.05))
        name = f"a query beside {bulk_inputs} inputs"
        self._out.add(load=name, **_latency(latencies), full_batch_ms=full_batch * 1000)
        self._out.raw[name] = {"latencies": latencies}
        self._out.ratios["p99 of a query beside bulk / (two full batches + 10 ms)"] = (
            report.percentile(latencies, 0.99) / (2 * full_batch + 0.01)
        )

    def _batch_seconds(self) -> float:
        return self._server.metric("nv_embed_batch_duration_seconds_sum")


def _p50_of_least(rounds: Sequence[Sequence[float]]) -> float:
    """The median text's fastest round; rounds: [round][text]."""
    return report.median(min(times) for times in zip(*rounds, strict=True))


def _latency(seconds: Sequence[float]) -> dict[str, float]:
    shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
    return {name: report.percentile(seconds, share) * 1000 for name, share in shares.items()}


def _batches(server: ServerProcess) -> tuple[float, float]:
    """Batches run so far, and the tokens in them."""
    name = "nv_embed_batch_tokens"
    return server.metric(f"{name}_count"), server.metric(f"{name}_sum")


def forward_alone(folder: Path, file: Path, options: argparse.Namespace) -> Forward:
    """By a fresh offline Encoder; file: a JSON list of texts."""
    command = [sys.executable, "-c", _BOUND, str(folder), options.dtype, options.quantization]
    command += [str(options.threads), str(file), str(LONE_TEXTS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return Forward(*json.loads(child.stdout))


if __name__ == "__main__":
    main()
