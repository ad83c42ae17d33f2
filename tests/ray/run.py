"""`make test-ray`: replicas of Ray Serve behind both of its proxies, beside the plain server.

Answers are compared byte for byte; a replica is killed under 16 busy connections, of which no more
requests fail than were in flight, and none through OpenAI's client; a changed argument is deployed
under load, and no request is lost. Runs in a network of its own, which has the loopback alone.
Ends with status 1 where anything is wrong or a process is left.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml

from tests.checkpoints import write_checkpoint
from tests.ray.cluster import APPLICATION, Cluster, Config
from tests.ray.program import in_own_network
from tests.server.processes import ServerProcess
from tests.server.questions import RUNNERS
from tests.server.steady_load import CONNECTIONS, Asking, SteadyLoad

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker/ray/serve.yaml"
MODES = {
    "Python proxy": {"RAY_SERVE_ENABLE_HA_PROXY": "0"},
    "HAProxy": {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # For load balancers beyond this machine to notice that a replica leaves.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    },
}
PORT, METRICS_PORT = 8000, 9100
REQUESTS = 1_000
KILL_AT = 300
"""After so many answers."""
PAUSE_S = 0.05
"""Between two requests of a connection, while replicas start on the same two cores."""
ROUNDS = 5
_SCRIPT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local number = 0
function request()
  number = number + 1
  return wrk.format(nil, nil, nil, '{"input": "text ' .. number .. '"}')
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("RESULT %d %d %d %d\\n", summary.requests, summary.duration,
    errors.status + errors.connect + errors.read + errors.timeout, latency:percentile(50)))
end
"""
QUESTIONS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/embeddings", {"model": "golden-embed", "input": ["one text", "and another"]}),
    ("POST", "/v1/embeddings", {"input": "a text", "encoding_format": "base64"}),
    ("POST", "/v1/embeddings", {"input": [f"text {number}" for number in range(200)]}),
    ("POST", "/v1/embeddings", {"input": []}),
    ("POST", "/v1/embeddings", {"input": "x", "model": "another"}),
    ("POST", "/v1/embeddings", {"input": "x", "dimensions": -1}),
    ("POST", "/v1/embeddings", {"input": "x" * 300_000}),
    ("POST", "/v1/embeddings", b"{"),
    ("POST", "/v1/embeddings", b"\xff"),
    ("POST", "/v1/embeddings", b"x" * (33 << 20)),
    ("POST", "/embed", {"inputs": ["one", "two"]}),
    ("POST", "/embed", {"inputs": 5}),
    ("POST", "/v2/embed", {"texts": 5}),
    ("GET", "/v1/embeddings", None),
    ("GET", "/v1/models/none", None),
    ("GET", "/nowhere", None),
    ("GET", "/readyz", None),
]


def main() -> int:
    arguments = argparse.ArgumentParser(prog="test-ray", description=__doc__)
    arguments.add_argument("--figures", action="store_true", help="what the proxies cost (wrk)")
    figures = arguments.parse_args().figures
    if figures and shutil.which("wrk") is None:
        arguments.exit(2, "--figures needs wrk: apt-get install wrk\n")
    if not in_own_network():
        print("this network is not one of its own: make test-ray")
        return 2
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder / "golden")
        log = folder / "plain"
        given = ("--no-access-log", "--cpu-products", "plain")  # others are chosen by their time
        plain = ServerProcess(checkpoint, *given, log=log).wait_ready()
        try:
            trials = [_Trial(folder, checkpoint, plain, mode, figures) for mode in MODES]
            wrong = [f"{trial.mode}: {one}" for trial in trials for one in trial.problems()]
        finally:
            plain.stop()
    print("\n".join(wrong) or f"all is as it should be, after {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


class _Trial:
    """Behind one of the proxies."""

    def __init__(
        self, folder: Path, checkpoint: Path, plain: ServerProcess, mode: str, figures: bool
    ) -> None:
        self._folder, self._plain, self.mode = folder / mode[:2], plain, mode
        self._figures = figures
        self._folder.mkdir()
        self._config = _config(checkpoint)
        self._url = f"http://127.0.0.1:{PORT}"
        self._answered = 0

    def problems(self) -> Iterator[str]:
        self._began = time.monotonic()
        self._cluster = Cluster(self._folder, METRICS_PORT, MODES[self.mode])
        try:
            self._cluster.deploy(self._config)
            self._cluster.wait("RUNNING", replicas=1)
            self._say("a replica")
            yield from self._answers_differ()
            if self.mode == "Python proxy":  # it makes no difference to these
                yield from self._metrics_are_missing()
                yield from self._a_typo_passes()
            else:
                yield from self._load_adds_no_replica()
            yield from self._redeploy_loses()
            if self._figures:
                self._measure()
            self._say(f"memory {self._cluster.memory() / 2**30:.1f} GiB")
            yield from self._kill_loses(Asking(self._url, connections=CONNECTIONS, timeout=60))
            self._cluster.wait("RUNNING", replicas=2)
            yield from self._kill_loses(_Sdk(self._url))
        finally:
            left = self._cluster.stop()
            self._say("stopped")
        if left:
            yield f"left: {left}"

    def _say(self, what: str) -> None:
        print(f"{self.mode}, {time.monotonic() - self._began:.0f} s: {what}", flush=True)

    def _load_adds_no_replica(self) -> Iterator[str]:
        if len(self._cluster.replicas()) != 1:
            yield f"one replica was to start, not {self._cluster.replicas()}"
        began = time.monotonic()
        with SteadyLoad(self._url, pause=0.01) as load:
            self._cluster.wait("RUNNING", replicas=2)
        self._say(f"a second one after {time.monotonic() - began:.0f} s of load")
        if lost := load.seen.total() - load.seen["200"]:
            yield f"meanwhile {lost} of {load.seen.total()} were lost: {dict(load.seen)}"

    def _answers_differ(self) -> Iterator[str]:
        with httpx.Client(base_url=self._url, timeout=60) as ray:
            for number, (method, path, body) in enumerate(QUESTIONS):
                given = {"content": body} if isinstance(body, bytes) else {"json": body}
                headers = {"content-type": "application/json", "x-request-id": f"id-{number}"}
                one, other = (
                    client.request(method, path, headers=headers, **(given if body else {}))
                    for client in (self._plain.client, ray)
                )
                if other.status_code == 200 and path in ("/v1/embeddings", "/embed"):
                    self._answered += 1
                if (one.status_code, one.content) != (other.status_code, other.content):
                    yield f"{path}: {one.status_code} {one.text!r}, not {other.text!r}"
                if (ids := other.headers.get_list("x-request-id")) != [f"id-{number}"]:
                    yield f"{path}: the ids are {ids}"
            ids = ray.get("/livez").headers.get_list("x-request-id")
            if len(ids) != 1 or not ids[0]:
                yield f"without an id from the client: {ids}"
        self._say(f"{len(QUESTIONS)} answers compared")

    def _metrics_are_missing(self) -> Iterator[str]:
        """They come every few seconds."""
        answered = self._answered
        wanted = r'^ray_nv_embed_requests_total{.*deployment="nv-embed".*route="embeddings".*'
        wanted += r'status="200".*} (\S+)$'
        deadline, seen = time.monotonic() + 30, 0.0
        while time.monotonic() < deadline and seen < answered:
            with contextlib.suppress(httpx.HTTPError):
                text = httpx.get(f"http://127.0.0.1:{METRICS_PORT}/metrics").text
                seen = sum(map(float, re.findall(wanted, text, re.M)))
            time.sleep(0.5)
        if seen != answered:
            yield f"Ray's metrics tell of {seen} requests, not {answered}"
        for name in ("nv_embed_workers_ready", "nv_embed_request_duration_seconds_bucket"):
            if f"ray_{name}{{" not in text:
                yield f"Ray's metrics do not tell of {name}"
        self._say(f"metrics of {seen:.0f} requests")

    def _a_typo_passes(self) -> Iterator[str]:
        config = copy.deepcopy(self._config)
        typo = {**config["applications"][0], "name": "typo", "route_prefix": "/typo"}
        typo["args"] = {**typo["args"], "max_batch_token": 100}
        config["applications"].append(typo)
        self._cluster.deploy(config)
        said = self._cluster.wait("DEPLOY_FAILED", "typo")
        if "unknown argument 'max_batch_token'; did you mean max_batch_tokens?" not in said:
            yield f"a typo: {said}"
        self._say("a typo is refused")

    def _redeploy_loses(self) -> Iterator[str]:
        """Other arguments, which replace both replicas."""
        before = self._cluster.replicas()
        args = self._config["applications"][0]["args"]
        args |= {"runner": f"{RUNNERS}Hashing", "min_replicas": 2}
        with SteadyLoad(self._url, pause=PAUSE_S) as load:
            time.sleep(1)
            began = time.monotonic()
            self._cluster.deploy(self._config)
            while set(before) & set(self._cluster.replicas()):
                time.sleep(0.5)
                if time.monotonic() - began > 120:
                    yield "replicas of before are still there"
                    return
            self._cluster.wait("RUNNING", replicas=2)
            took = time.monotonic() - began
            while load.seen.total() < REQUESTS:
                time.sleep(0.1)
        lost = load.seen.total() - load.seen["200"]
        self._say(
            f"deployed anew in {took:.0f} s: {lost} of {load.seen.total()} lost {dict(load.seen)}"
        )
        if lost:
            yield f"a new deployment lost {lost} of {load.seen.total()}: {dict(load.seen)}"

    def _measure(self) -> None:
        """In turns with a plain server of the same runner; medians."""
        checkpoint = Path(self._config["applications"][0]["args"]["model"])
        given = ("--runner", f"{RUNNERS}Hashing", "--no-access-log")
        plain = ServerProcess(checkpoint, *given, log=self._folder / "plain").wait_ready()
        try:
            for connections in (1, CONNECTIONS):
                rounds = [
                    (_wrk(plain.url, connections), _wrk(self._url, connections))
                    for _ in range(ROUNDS)
                ]
                for name, found in zip(("plain", "Ray"), zip(*rounds, strict=True), strict=True):
                    p50, rate = map(statistics.median, zip(*found, strict=True))
                    said = f"p50 {p50:.1f} ms, {rate:.0f} req/s"
                    self._say(f"{name}, {connections} connections: {said}")
        finally:
            plain.stop()

    def _kill_loses(self, ask: Asking | _Sdk) -> Iterator[str]:
        """What is asked raw may lose what is in flight, the other nothing. HAProxy loses a request,
        at most, for each connection that it has to the replica: as many as ask."""
        seen: Counter[str] = Counter()
        victim = self._cluster.replicas()[0]

        async def connection(numbers: Iterator[int]) -> None:
            for number in numbers:
                seen[await ask(number)] += 1
                if seen.total() == KILL_AT:
                    os.kill(victim, signal.SIGKILL)

        async def all_of_them() -> None:
            numbers = iter(range(REQUESTS))
            async with ask:
                await asyncio.gather(*(connection(numbers) for _ in range(CONNECTIONS)))

        asyncio.run(all_of_them())
        what = "httpx" if isinstance(ask, Asking) else "OpenAI's client"
        failed = seen.total() - seen["200"]
        self._say(f"a replica killed, {what}: {failed} of {seen.total()} failed {dict(seen)}")
        if seen.total() != REQUESTS or victim in self._cluster.replicas():
            yield f"{seen.total()} requests, and {victim} was to be killed"
        if failed > (CONNECTIONS if isinstance(ask, Asking) else 0):
            yield f"a replica killed, {what}: {failed} failed {dict(seen)}"


def _config(checkpoint: Path) -> Config:
    """The one that is shipped, for a small model and up to two replicas on two cores."""
    config: Config = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": PORT}
    (application,) = config["applications"]
    assert application["name"] == APPLICATION
    application["args"] |= {
        "model": str(checkpoint),
        "devices": "cpu",
        "dtype": "float32",
        "cpu_products": "plain",
        "num_cpus": 0.1,
        "access_log": False,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 1,
    }
    return config


class _Sdk:
    """Asks with what OpenAI's client does by itself: two more tries."""

    def __init__(self, url: str) -> None:
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none")

    async def __call__(self, number: int) -> str:
        try:
            await self._client.embeddings.create(model="golden-embed", input=f"text {number}")
        except openai.OpenAIError as error:
            return repr(error)
        return "200"

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()


def _wrk(url: str, connections: int) -> tuple[float, float]:
    """-> (median in ms, requests/s)."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT)
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", "-d3s", "-s", script.name]
        said = subprocess.run(
            [*command, f"{url}/v1/embeddings"], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+)", said)
    assert found is not None, said
    requests, microseconds, errors, p50 = map(int, found.groups())
    assert errors == 0, said
    return p50 / 1000, requests / microseconds * 1e6


if __name__ == "__main__":
    sys.exit(main())
