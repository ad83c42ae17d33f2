"""A step of `gpu-check`: a real server in a process of its own, measured over HTTP.

The other steps are model.verify's, which calls this one by its name.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from model.verify import child
from server.settings import ENV_PREFIX

if TYPE_CHECKING:
    from model.verify.bench import Bench

_TEXTS = 64
"""Inputs of a request of the throughput's."""
_CONNECTIONS = 4
_POLL_S = 0.1
_MOST_SAID = 4000
_SERVED_NAME = "gpu-check"


def serving(
    bench: Bench,
    seconds: float,
    lone_runs: int,
    lone_tokens: int,
    length: int,
    max_input_tokens: int,
    ready_s: float,
) -> dict[str, Any]:
    """A server's own figures: lone queries one after another, then lists of texts at once."""
    with _server(bench, max_input_tokens, ready_s) as address:
        query = _body(bench, lone_tokens, 1)
        with _Client(address) as client:
            for _ in range(5):
                client.embed(query)
            latencies = np.array([client.embed(query) for _ in range(lone_runs)])
        lists = [_body(bench, length, _TEXTS, seed) for seed in range(_CONNECTIONS)]
        _requests(address, lists, 0.0)  # warms up
        done, taken = _requests(address, lists, seconds)
    return {
        "lone_tokens": lone_tokens,
        **{f"lone_p{p}_ms": 1e3 * float(np.percentile(latencies, p)) for p in (50, 99)},
        "lists": done,
        "tokens_per_s": done * _TEXTS * length / taken,
    }


def _body(bench: Bench, length: int, count: int, seed: int = 0) -> bytes:
    inputs = [text.ids.tolist() for text in bench.texts(length, count * length, seed)]
    fields = {"model": _SERVED_NAME, "input": inputs, "encoding_format": "base64"}
    return json.dumps(fields).encode()


class _Client:
    """One connection, kept."""

    def __init__(self, address: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def embed(self, body: bytes) -> float:
        """Seconds that the answer took. Raises RuntimeError for what is no vectors."""
        started = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/embeddings", body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}: {content[:500]!r}")
        return time.perf_counter() - started


def _is_ready(address: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200


def _requests(address: str, bodies: Sequence[bytes], seconds: float) -> tuple[int, float]:
    """Each body on a connection of its own, again and again. -> (answers, seconds)."""
    done: list[int] = []
    errors: list[Exception] = []
    started = time.perf_counter()

    def work(body: bytes) -> None:
        count = 0
        try:
            with _Client(address) as client:
                while not count or time.perf_counter() - started < seconds:
                    client.embed(body)
                    count += 1
        except Exception as error:
            errors.append(error)
        done.append(count)

    threads = [threading.Thread(target=work, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(done), time.perf_counter() - started


@contextlib.contextmanager
def _server(bench: Bench, max_input_tokens: int, ready_s: float) -> Iterator[str]:
    """A server that is ready, of this run's options and no others; its address."""
    job, log = bench.job, bench.work / "server.log"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)
    }
    device = "cuda:0" if job["device"] == "cuda" else job["device"]
    command = [sys.executable, "-P", "-m", "server.cli", "serve", "--model", job["path"]]
    command += ["--family", bench.source.family]
    command += ["--devices", device, "--attention", job["attention"], "--port", "0"]
    command += ["--served-model-name", _SERVED_NAME]
    command += ["--cuda-graphs"] if bench.records(job["base"]) else []
    command += ["--max-input-tokens", str(max_input_tokens), "--token-ids", "model"]
    command += ["--runner", job["runner"]] if job.get("runner") else []
    with log.open("wb") as said:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            preexec_fn=child.end_with_parent,
        )
    try:
        yield _ready(process, log, ready_s)
    except Exception as error:
        raise RuntimeError(f"{error}\n{_said(log)}") from error
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _said(log: Path) -> str:
    """The end of the server's log, without our own asking whether it is ready."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "/readyz" not in line)[-_MOST_SAID:]


def _ready(process: subprocess.Popen[bytes], log: Path, seconds: float) -> str:
    """The address, once the server is ready. Raises RuntimeError when it does not get so."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"listening on (http://\S+);", log.read_text(errors="replace"))
        with contextlib.suppress(OSError):  # it is about to end: poll tells
            if found and _is_ready(found[1]):
                return found[1]
        time.sleep(_POLL_S)
    if process.poll() is None:
        raise RuntimeError(f"the server is not ready after {seconds:g} s")
    raise RuntimeError(f"the server ended with status {process.returncode}")
