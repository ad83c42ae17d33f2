"""How long others wait while clients fetch the largest answers that there are, or send the
largest bodies.

Two probes ask all the while: one for /livez, one for the vector of one text, each a few
milliseconds after its last answer. The runner computes nothing (4,096 dimensions), so what they
wait for is the front: printing, parsing, tokenizing, dealing out rows. `beyond` is the worst answer
minus the median on a server that has nothing else to do. `cpu` is the processor time that the front
took while the probe waited, which other programs on the machine do not lengthen; `slept` is the
worst by which the probes' own pauses were too long, which is all theirs. Probes, clients and worker
share the last core, and the clients yield to the probes; the front may use all. With --against
other checkouts are measured, too, in turns; figures are medians over the rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import report
from tests.bench.front import checkpoint, cpu_ns, pin
from tests.bench.large_clients import fetch, probe, request
from tests.chaos.load import address
from tests.server.processes import ROOT, ServerProcess

KINDS = ("floats", "base64", "texts", "ids", "string", "escapes", "unknown")
_WORDS = "how does a search engine find the passages that answer a question "
_LARGE = 31 << 20  # bytes, of the 32 MiB that a body may have


def body_of(kind: str, client: int, inputs: int, size: int) -> bytes:
    """A request of this kind; no two clients send the same texts."""
    short = [f"{client} of {number}" for number in range(inputs)]
    ids = [[1, *range(1000, 1000 + 300_000 // 2048 - 3), 2]] * inputs
    fields: dict[str, object] = {
        "floats": {"input": short},
        "base64": {"input": short, "encoding_format": "base64"},
        "texts": {"input": [_WORDS * (size // 2048 // len(_WORDS))] * inputs},
        "ids": {"input": ids},
        "string": {"input": _WORDS * (size // len(_WORDS)), "truncate": "END"},
        "escapes": {"input": "\u00e4\n" * (size // 8), "truncate": "END"},
        "unknown": {"input": "x", "metadata": [_WORDS * 10] * (size // (10 * len(_WORDS) + 4))},
    }[kind]
    return json.dumps(fields).encode()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS), help="of the clients' requests")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--size", type=int, default=_LARGE, help="bytes of a large body")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", default="", help="other checkouts, one comma apart")
    options = parser.parse_args(arguments)
    out = report.Report("large", __doc__ or "", report.settings_of(options))
    out.start()
    others = [Path(name) for name in options.against.split(",") if name]
    checkouts = {"this": ROOT} | {folder.name: folder for folder in others}
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = checkpoint(folder)
        servers = {
            name: stack.enter_context(_serving(model, folder / name, checkout.resolve()))
            for name, checkout in checkouts.items()
        }
        for number in range(options.rounds):
            for kind in ("nothing", *options.kinds.split(",")):
                for name, server in servers.items():
                    run = _measure(server, kind, options)
                    runs.setdefault((kind, name), []).append(run)
            print(f"round {number + 1} of {options.rounds}", flush=True)
    for (kind, name), figures in runs.items():
        out.add(load=kind, server=name, **_middle(figures, runs["nothing", name]))
    out.raw = {" ".join(key): figures for key, figures in runs.items()}
    out.finish(
        options.results, group="load", label="server", value="livez_beyond_ms", unit="worst, ms"
    )


def _middle(
    figures: Sequence[dict[str, float]], quiet: Sequence[dict[str, float]]
) -> dict[str, float]:
    """Medians over the rounds, and how far the worst is beyond the probes' own work."""
    row = {key: report.median(run[key] for run in figures) for key in figures[0]}
    for name in ("livez", "query"):
        own = report.median(run[f"{name}_p50_ms"] for run in quiet)
        row[f"{name}_beyond_ms"] = row.pop(f"{name}_worst_ms") - own
    return row


@contextmanager
def _serving(model: Path, folder: Path, checkout: Path) -> Iterator[ServerProcess]:
    folder.mkdir()
    wanted = ("--runner", "tests.bench.runners:Null", "--max-inflight-bytes", str(4 << 30))
    wanted += ("--max-queued-tokens", "10000000")  # nobody shall be refused
    environment = {"PYTHONPATH": str(checkout)}
    server = ServerProcess(model, *wanted, log=folder / "log", env=environment)
    try:
        server.wait_ready()
        for pid in server.worker_pids():
            pin(pid, _cores()[-1])
        yield server
    finally:
        server.stop()


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _measure(server: ServerProcess, kind: str, options: Namespace) -> dict[str, float]:
    where, core = address(server), _cores()[-1]
    query = request("POST", "/v1/embeddings", json.dumps({"input": _WORDS}).encode())
    probes = {"livez": request("GET", "/livez"), "query": query}
    clients = [] if kind == "nothing" else range(options.clients)
    loads = [
        request("POST", "/v1/embeddings", body_of(kind, client, options.inputs, options.size))
        for client in clients
    ]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(abs, range(2))  # both have started
        pid = server.process.pid
        before = cpu_ns(pid)
        fetching = pool.apply_async(fetch, (where, loads, options.seconds, core))
        waits = pool.apply_async(probe, (where, probes, options.seconds, core, pid)).get()
        front_ms = (cpu_ns(pid) - before) / 1e6
        fetched = fetching.get()
    assert set(fetched.statuses) <= {200, 400}, fetched.statuses
    run: dict[str, float] = {}
    for name, waited in waits.items():
        run[f"{name}_p50_ms"] = report.median(waited.wall)
        run[f"{name}_worst_ms"] = max(waited.wall)
        run[f"{name}_cpu_p99_ms"] = report.percentile(waited.cpu, 0.99)
        run[f"{name}_cpu_ms"] = max(waited.cpu)
    run["slept_ms"] = max(ms for waited in waits.values() for ms in waited.slept)
    run["requests"] = sum(fetched.statuses.values())
    run["mb_per_s"] = fetched.megabytes / options.seconds
    run["front_cpu"] = front_ms / options.seconds / 1000
    return run


if __name__ == "__main__":
    main()
