"""Requests/s and latency of the whole HTTP path, against a bare FastAPI handler that returns the
same bytes, in one run.

The path: real tokenizer, queue, a worker process with a runner that computes nothing (4,096
dimensions), answer; access log, an API key and metrics on. The bare handler reads the body and
returns stored bytes under the same uvicorn, uvloop and httptools. Each front process is pinned to
one core; the worker and the load generator (wrk) share another. Rounds alternate; ratios are
medians over the rounds. `front_cpu_us` is the processor time that the front process took for a
request: where it has its core to itself and is busy, requests/s are a million divided by it, and on
a machine that does other work, too, it is the steadier figure. With --against the server of another
checkout takes its turns as well: many short rounds tell small differences.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.bench import report
from tests.bench.runners import WIDTH
from tests.checkpoints import official_tokenizer
from tests.model.test_config import OFFICIAL
from tests.server.processes import ROOT, ServerProcess, free_ports

KEY = "a-key-of-the-bench"
TEXT = "how does a search engine find the passages that answer a question"
_SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {key}"
local body, number = [==[{body}]==], 0
-- No two requests are alike: the server computes equal inputs in flight once.
function request()
  number = number + 1
  return wrk.format(nil, nil, nil, (body:gsub("NUMBER", number)))
end
function done(summary, latency, requests)
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout,
    latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
"""
_BARE = """
import sys, asyncio, uvicorn
from fastapi import FastAPI, Request, Response
app, stored = FastAPI(), {}
@app.put("/answer/{name}")
async def store(name: str, request: Request): stored[name] = await request.body()
@app.post("/{name}")
async def answer(name: str, request: Request):
    await request.body()
    return Response(stored[name], media_type="application/json")
uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False,
            log_level="warning")
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--connections", default="1,16,64")
    parser.add_argument("--inputs", default="1,32")
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", default="", help="another checkout")
    options = parser.parse_args(arguments)
    if shutil.which("wrk") is None:
        parser.exit(2, "this benchmark needs wrk: apt-get install wrk\n")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.exit(2, "this benchmark needs two cores: one for the front, one for the load\n")
    out = report.Report("front", __doc__ or "", report.settings_of(options))
    out.start()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = checkpoint(folder)
        checkouts = {"nv-embed": ROOT}
        if options.against:
            checkouts["against"] = Path(options.against).resolve()
        servers = {
            name: stack.enter_context(_nv_embed(model, folder / f"{name}.log", checkout, cores))
            for name, checkout in checkouts.items()
        }
        bare, theirs = stack.enter_context(_bare(cores))
        for inputs in map(int, options.inputs.split(",")):
            texts = [f"{TEXT}, part {index} of NUMBER" for index in range(inputs)]
            for encoding in ("base64", "float"):
                body = json.dumps({"input": texts, "model": "front", "encoding_format": encoding})
                _store_answer(servers["nv-embed"][0], bare, f"{encoding}-{inputs}", body)
                targets = {
                    name: (f"{url}/v1/embeddings", pid) for name, (url, pid) in servers.items()
                }
                targets["bare"] = (f"{bare}/{encoding}-{inputs}", theirs)
                for connections in map(int, options.connections.split(",")):
                    runs: dict[str, list[dict[str, float]]] = {name: [] for name in targets}
                    for _ in range(options.rounds):
                        for name, (target, pid) in targets.items():
                            script = folder / "wrk.lua"
                            script.write_text(_SCRIPT.replace("{key}", KEY).replace("{body}", body))
                            before = cpu_ns(pid)
                            run = _wrk(target, script, connections, options.seconds, cores[1])
                            run["front_cpu_us"] = (cpu_ns(pid) - before) / run["requests"] / 1000
                            runs[name].append(run)
                    _report(out, inputs, encoding, connections, runs)
    out.finish(
        options.results, group="workload", label="server", value="requests_per_s", unit="requests/s"
    )


def _report(
    out: report.Report,
    inputs: int,
    encoding: str,
    connections: int,
    runs: dict[str, list[dict[str, float]]],
) -> None:
    workload = f"{inputs} x {encoding}, {connections} conn."
    for server, figures in runs.items():
        middle = {key: statistics.median(run[key] for run in figures) for key in figures[0]}
        out.add(workload=workload, server=server, **middle)
    for name in runs.keys() - {"nv-embed"}:
        pairs = list(zip(runs["nv-embed"], runs[name], strict=True))
        out.ratios[f"{workload}: requests/s, nv-embed / {name}"] = statistics.median(
            ours["requests_per_s"] / other["requests_per_s"] for ours, other in pairs
        )
        out.ratios[f"{workload}: CPU, {name} / nv-embed"] = statistics.median(
            other["front_cpu_us"] / ours["front_cpu_us"] for ours, other in pairs
        )
    out.raw[workload] = runs


def checkpoint(folder: Path) -> Path:
    """Config and tokenizer of an official model, for a runner that reads no weights."""
    model = folder / "front"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({**OFFICIAL, "_name_or_path": "front"}))
    official_tokenizer().save(str(model / "tokenizer.json"))
    save_file({"nothing": np.zeros(1, np.float32)}, model / "model.safetensors")
    return model


@contextmanager
def _nv_embed(
    model: Path, log: Path, checkout: Path, cores: Sequence[int]
) -> Iterator[tuple[str, int]]:
    """A server with the null runner: its address and its process id."""
    options = ("--runner", "tests.bench.runners:Null", "--api-key", KEY)
    environment = {"PYTHONPATH": str(checkout)}
    server = ServerProcess(model, *options, log=log, env=environment, ids_of=None)
    try:
        server.wait_ready()
        pin(server.process.pid, cores[0])
        for pid in server.worker_pids():
            pin(pid, cores[1])
        yield server.url, server.process.pid
    finally:
        server.stop()


@contextmanager
def _bare(cores: Sequence[int]) -> Iterator[tuple[str, int]]:
    import httpx

    (port,) = free_ports(1)
    process = subprocess.Popen([sys.executable, "-c", _BARE, str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(transport=transport) as client:
            assert client.get(f"{url}/").status_code == 404
        pin(process.pid, cores[0])
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def pin(pid: int, core: int) -> None:
    """All threads of a process to one core."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def cpu_ns(pid: int) -> int:
    """Processor time that all threads of a process have had."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def _store_answer(url: str, bare: str, name: str, body: str) -> None:
    """Give the bare handler the bytes that the server answers with."""
    import httpx

    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{url}/v1/embeddings", content=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    assert len(answer.content) > 4 * WIDTH * len(json.loads(body)["input"])
    httpx.put(f"{bare}/answer/{name}", content=answer.content).raise_for_status()
    assert httpx.post(f"{bare}/{name}", content=body).content == answer.content


def _wrk(url: str, script: Path, connections: int, seconds: float, core: int) -> dict[str, float]:
    command = ["taskset", "-c", str(core), "wrk", "-t", "1", "-c", str(connections)]
    command += ["-d", f"{max(1, round(seconds))}s", "-s", str(script), url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    match = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", text)
    assert match is not None, text
    requests, microseconds, errors, p50, p95, p99 = map(int, match.groups())
    assert errors == 0, text
    return {
        "requests": requests,
        "requests_per_s": requests / microseconds * 1e6,
        "p50_ms": p50 / 1000,
        "p95_ms": p95 / 1000,
        "p99_ms": p99 / 1000,
    }


if __name__ == "__main__":
    main()
