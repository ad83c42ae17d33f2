"""A long run of mixed load against the real server and the shipped model: does anything grow?

`python -m tests.chaos.soak --minutes 10 --out build/soak` prints a line each window, a table and
one line of JSON, writes the samples and a plot, and exits 1 when a bound is broken:

- every single query and every bulk request is answered rightly, although a worker is killed in
  every window (always the younger of two, so that the elder's memory tells of the whole run);
- resident memory of the front and of the elder worker grows by less than 2 % after the warm-up
  (batches of every size, then a fifth of the run), by a straight line through all samples: a
  worker's memory goes up and down with its batches, so that two moments would measure chance;
- file descriptors and tasks after the load are those of before;
- the p99 of single queries: the median over the windows of the second half is at most 1.5 times
  that of the first half after the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.load import Connection, address, post, rss_bytes
from tests.chaos.test_bad_requests import bodies
from tests.chaos.test_clients_vanish import vanish
from tests.server.processes import ServerProcess
from tests.server.questions import WORDS

MODEL = "golden-embed"  # the name that the generated bad requests send
OPTIONS = ("--devices", "cpu,cpu", "--served-model-name", MODEL, "--no-access-log")
QUERY_CLIENTS = 4
MOST_SWEEPS = 10
LEVEL = 0.001
RIGHT = {"float32": 0.999999}
"""Least cosine of an answer to the text's vector alone; 0.999 in other types, which round each
batch differently."""


@dataclass(frozen=True)
class Bounds:
    growth: float = 0.02
    p99_ratio: float = 1.5


@dataclass
class Sample:
    second: float
    front_bytes: int
    worker_bytes: int  # of the elder
    files: int
    tasks: float


@dataclass
class Window:
    samples: list[Sample] = field(default_factory=list)
    query_s: list[float] = field(default_factory=list)
    answered: dict[str, int] = field(default_factory=dict)  # kind of request -> how many

    def p99_ms(self) -> float:
        return round(1000 * float(np.percentile(self.query_s, 99)), 1)

    def median(self, name: str) -> float:
        return statistics.median(getattr(sample, name) for sample in self.samples)


class Soak:
    """One run. Its clients live in this process, and ask much less than the server could do."""

    def __init__(
        self, server: ServerProcess, seconds: float, windows: int, right: float, sweeps: int
    ) -> None:
        self._server, self._num_windows, self._cosine = server, windows, right
        self._most_sweeps = sweeps
        self._window_s = seconds / windows
        self._dice = random.Random(61)
        self._texts = [
            " ".join(self._dice.choices(WORDS, k=self._dice.randint(3, 60))) for _ in range(50)
        ]
        self._elder = server.worker_pids()[0]
        self._ended = False
        self.kills = 0
        self.wrong: list[str] = []
        self.windows: list[Window] = []

    async def run(self) -> None:
        self._right = np.stack([await self._quiet(text) for text in self._texts])
        others = self._right @ self._right.T - 2 * np.eye(len(self._right))
        assert others.max() < 0.99, "texts too alike to tell their vectors apart"
        await self._sweep()
        self._bad = bodies(random.Random(62), sys.maxsize)
        self.windows.append(Window())
        self._began = time.monotonic()
        tasks = [asyncio.create_task(self._repeat(self._query, 0.1)) for _ in range(QUERY_CLIENTS)]
        for work, pause in (
            (self._bulk, 1.0),
            (self._bad_request, 0.1),
            (self._vanish, 0.2),
            (self._sample, min(1.0, self._window_s / 4)),
            (self._kill, self._window_s),
        ):
            tasks.append(asyncio.create_task(self._repeat(work, pause)))
        for index in range(1, self._num_windows + 1):
            await asyncio.sleep(self._began + index * self._window_s - time.monotonic())
            self._tell(index)
            if index < self._num_windows:
                self.windows.append(Window())
        self._ended = True
        await asyncio.gather(*tasks)

    async def _sweep(self) -> None:
        """Batches of every size, until the worker grows no more: it keeps the code that is compiled
        for each, and a rare size that comes late would read as growth. One that never stops
        growing is measured all the same."""
        connections = [await Connection.to(*address(self._server)) for _ in range(4)]
        level = 0
        for sweep in range(1, self._most_sweeps + 1):
            before = rss_bytes(self._elder)
            for count in range(1, 33):  # several at once, so that both workers get some
                counts = [count, *self._dice.choices(range(1, 33), k=len(connections) - 1)]
                asked = [
                    connection.ask(request_of(self._dice.choices(self._texts, k=k)))
                    for connection, k in zip(connections, counts, strict=True)
                ]
                for answer in await asyncio.gather(*asked):
                    assert answer.status == 200, answer.body[:200]
            grown = rss_bytes(self._elder) / before - 1
            print(f"sweep {sweep}: worker {before / 1e6:.1f} MB, {grown:+.2%}", flush=True)
            level = level + 1 if grown < LEVEL else 0
            if level == 2:
                break
        for connection in connections:
            connection.close()

    async def _repeat(self, work: Callable[[Connection], Awaitable[None]], pause: float) -> None:
        """On a connection of its own, which is made again when the server has closed it."""
        connection = await Connection.to(*address(self._server))
        while not self._ended:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * pause)
            if not connection.open:
                connection = await Connection.to(*address(self._server))
            await work(connection)
        connection.close()

    async def _quiet(self, text: str) -> np.ndarray:
        connection = await Connection.to(*address(self._server))
        answer = await connection.ask(request_of(text))
        connection.close()
        return vectors_of(answer.body)[0]

    def _count(self, kind: str) -> None:
        answered = self.windows[-1].answered
        answered[kind] = answered.get(kind, 0) + 1

    # What the clients do

    async def _query(self, connection: Connection) -> None:
        index = self._dice.randrange(len(self._texts))
        answer = await connection.ask(request_of(self._texts[index]))
        if answer.status != 200:
            self.wrong.append(f"query: {answer.status} {answer.body[:200]!r}")
        elif not vectors_of(answer.body)[0] @ self._right[index] >= self._cosine:
            self.wrong.append("query: another text's vector")
        self.windows[-1].query_s.append(answer.seconds)
        self._count("queries")

    async def _bulk(self, connection: Connection) -> None:
        chosen = self._dice.choices(range(len(self._texts)), k=32)
        answer = await connection.ask(request_of([self._texts[index] for index in chosen]))
        if answer.status != 200:
            self.wrong.append(f"bulk: {answer.status} {answer.body[:200]!r}")
        elif not (vectors_of(answer.body) * self._right[chosen]).sum(1).min() >= self._cosine:
            self.wrong.append("bulk: wrong vectors")
        self._count("bulk")

    async def _bad_request(self, connection: Connection) -> None:
        answer = await connection.ask(post(next(self._bad)))
        if answer.status not in (200, 400, 404):
            self.wrong.append(f"bad request: {answer.status} {answer.body[:200]!r}")
        self._count("bad")

    async def _vanish(self, connection: Connection) -> None:
        texts = self._dice.choices(self._texts, k=8)
        await vanish(*address(self._server), request_of(texts), self._dice)
        self._count("vanished")

    async def _kill(self, connection: Connection) -> None:
        workers = await asyncio.to_thread(self._server.worker_pids)
        younger = [pid for pid in workers if pid != self._elder]
        if len(workers) == 2 and self._elder in workers:
            os.kill(younger[0], signal.SIGKILL)
            self.kills += 1
        elif self._elder not in workers:
            self.wrong.append("the elder worker has gone")

    async def _sample(self, connection: Connection) -> None:
        self.windows[-1].samples.append(
            await asyncio.to_thread(sample, self._server, self._elder, self._began)
        )

    def _tell(self, index: int) -> None:
        window = self.windows[-1]
        print(
            f"window {index}/{self._num_windows}: {window.answered}, p99 {window.p99_ms()} ms, "
            f"front {window.median('front_bytes') / 1e6:.1f} MB, "
            f"worker {window.median('worker_bytes') / 1e6:.1f} MB, "
            f"{self.kills} kills, {len(self.wrong)} wrong",
            flush=True,
        )


def request_of(inputs: str | list[str]) -> bytes:
    return post(json.dumps({"model": MODEL, "input": inputs}).encode())


def vectors_of(body: bytes) -> np.ndarray:
    """float32 [N, D]."""
    items = json.loads(body)["data"]
    return np.array([item["embedding"] for item in items], dtype=np.float32)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def sample(server: ServerProcess, worker: int, began: float) -> Sample:
    front = server.process.pid
    return Sample(
        round(time.monotonic() - began, 1),
        rss_bytes(front),
        rss_bytes(worker),
        open_files(front),
        server.metric("nv_embed_event_loop_tasks"),
    )


def soak(
    seconds: float,
    out: Path,
    bounds: Bounds,
    windows: int = 10,
    dtype: str = "auto",
    options: Sequence[str] = (),
    sweeps: int = MOST_SWEEPS,
) -> dict[str, Any]:
    """Run it, write `samples.csv`, `soak.png` and the server's log to `out`; -> the figures, with
    `broken`: what was not as it should be. sweeps: at most so many before it measures."""
    out.mkdir(parents=True, exist_ok=True)
    server = ServerProcess(None, *OPTIONS, "--dtype", dtype, *options, log=out / "server.log")
    try:
        server.wait_ready().wait_for_metric("nv_embed_workers_ready", 2)
        run = Soak(server, seconds, windows, RIGHT.get(dtype, 0.999), sweeps)
        with asyncio.Runner() as runner:
            runner.run(run._quiet("what is made once, is made"))
            before = settled(server, run)
            runner.run(run.run())
            server.wait_for_metric("nv_embed_workers_ready", 2)
            after = settled(server, run)
        status = server.stop()
    finally:
        server.process.kill()
        server.stop()
    figures = judge(run, before, after, bounds)
    if status:
        figures["broken"].append(f"the server ended with {status}")
    if "Traceback" in server.log:
        figures["broken"].append("a traceback in the log")
    write_samples(run.windows, out / "samples.csv")
    plot(run.windows, out / "soak.png")
    return figures


def settled(server: ServerProcess, run: Soak) -> dict[str, float]:
    """What must be the same before and after; closed connections take a moment to go."""

    def read() -> dict[str, float]:
        return {
            "files": open_files(server.process.pid),
            "worker_files": open_files(run._elder),
            "tasks": server.metric("nv_embed_event_loop_tasks"),
            "queued_tokens": server.metric("nv_embed_queued_tokens"),
            "inflight_bytes": server.metric("nv_embed_inflight_bytes"),
        }

    seen = read()
    while True:
        time.sleep(1.0)
        again = read()
        if again == seen:
            return seen
        seen = again


def judge(
    run: Soak, before: dict[str, float], after: dict[str, float], bounds: Bounds
) -> dict[str, Any]:
    warm_up = len(run.windows) // 5
    windows = run.windows[warm_up:]
    growth = {
        name: relative_growth([s for window in windows for s in window.samples], f"{name}_bytes")
        for name in ("front", "worker")
    }
    p99 = [window.p99_ms() for window in run.windows]
    half = len(windows) // 2
    early, late = statistics.median(p99[warm_up:-half]), statistics.median(p99[-half:])
    broken = [*run.wrong[:5]]
    broken += [f"{name}: {g:+.1%} of memory" for name, g in growth.items() if g >= bounds.growth]
    broken += [
        f"{name}: {before[name]} before, {after[name]} after"
        for name in before
        if after[name] > before[name]
    ]
    if late > bounds.p99_ratio * early:
        broken.append(f"p99: {early} ms, then {late} ms")
    if not run.kills:
        broken.append("no worker was killed")
    counts: dict[str, int] = {}
    for window in run.windows:
        for kind, count in window.answered.items():
            counts[kind] = counts.get(kind, 0) + count
    return {
        "seconds": round(run._window_s * len(run.windows)),
        "requests": counts,
        "wrong": len(run.wrong),
        "kills": run.kills,
        "front_mb": [round(w.median("front_bytes") / 1e6, 1) for w in run.windows],
        "worker_mb": [round(w.median("worker_bytes") / 1e6, 1) for w in run.windows],
        "growth_percent": {name: round(100 * g, 2) for name, g in growth.items()},
        "p99_ms": p99,
        "p99_early_late_ms": [early, late],
        "before": before,
        "after": after,
        "broken": broken,
    }


def relative_growth(samples: list[Sample], name: str) -> float:
    """From the first to the last sample, by the line that fits all best."""
    seconds = np.array([one.second for one in samples])
    values = np.array([getattr(one, name) for one in samples])
    slope, start = np.polyfit(seconds - seconds[0], values, 1)
    return float(slope * (seconds[-1] - seconds[0]) / start)


def write_samples(windows: list[Window], file: Path) -> None:
    with file.open("w", newline="") as target:
        rows = [asdict(one) for window in windows for one in window.samples]
        writer = csv.DictWriter(target, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def plot(windows: list[Window], file: Path) -> None:
    from matplotlib.figure import Figure

    samples = [one for window in windows for one in window.samples]
    seconds = [one.second for one in samples]
    figure = Figure(figsize=(8, 9), layout="constrained")
    memory, counts, latency = figure.subplots(3, 1, sharex=True)
    memory.plot(seconds, [one.front_bytes / 1e6 for one in samples], label="front")
    memory.plot(seconds, [one.worker_bytes / 1e6 for one in samples], label="elder worker")
    memory.set(ylabel="resident memory, MB", ylim=(0, None))
    counts.plot(seconds, [one.files for one in samples], label="front's open files")
    counts.plot(seconds, [one.tasks for one in samples], label="event loop tasks")
    counts.set(ylim=(0, None))
    ends = [window.samples[-1].second for window in windows]
    latency.plot(ends, [window.p99_ms() for window in windows], "o-", label="p99 of single queries")
    latency.set(ylabel="ms", xlabel="seconds", ylim=(0, None))
    for axes in (memory, counts, latency):
        axes.legend(loc="lower right")
        axes.grid(alpha=0.3)
    figure.savefig(file)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dtype", default="auto", help="as the server's (default: auto)")
    parser.add_argument("--quantization", default="none", help="as the server's (default: none)")
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    options = parser.parse_args()
    figures = soak(
        60 * options.minutes,
        options.out.resolve(),
        Bounds(),
        dtype=options.dtype,
        options=("--quantization", options.quantization, "--cpu-products", "allow-slow"),
    )
    print("window  front MB  worker MB  p99 ms")
    rows = zip(figures["front_mb"], figures["worker_mb"], figures["p99_ms"], strict=True)
    for index, (front, worker, p99) in enumerate(rows, start=1):
        print(f"{index:6}  {front:8.1f}  {worker:9.1f}  {p99:6.1f}")
    for problem in figures["broken"]:
        print(f"BROKEN: {problem}")
    print(json.dumps(figures))
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
