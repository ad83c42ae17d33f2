"""Pods of the rendered chart, as plain processes: they become ready, leave without losing a
request, and end in time; and one whose device is lost ends by itself.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.docker.kubelet import Pod
from tests.server.questions import RUNNERS

PATIENCE_S = 60.0


def problems(pod: dict[str, Any], folder: Path, checkpoint: Path) -> Iterator[str]:
    """pod: of a Deployment that runs the shipped model on a CPU. checkpoint: what the tests' own
    runners pass for."""
    fake = {"NV_EMBED_MODEL": str(checkpoint)}
    yield from _of_a_stop(pod, folder, "a pod", {})
    busy = {**fake, "NV_EMBED_RUNNER": f"{RUNNERS}Hashing", "FAKE_SECONDS": "300"}
    yield from _of_a_stop(pod, folder, "a pod with a request that takes too long", busy)
    yield from _of_a_lost_device(pod, folder, fake)


def _of_a_stop(
    pod: dict[str, Any], folder: Path, title: str, environment: dict[str, str]
) -> Iterator[str]:
    running = Pod(pod, folder / "pod-log", **environment)
    if not running.ready.wait(PATIENCE_S):
        running.terminate()
        yield f"{title} does not become ready: {running.log.read_text()}"
        return
    seen: Counter[int] = Counter()
    over = threading.Event()
    clients = [threading.Thread(target=_ask, args=(running, seen, over)) for _ in range(4)]
    for client in clients:
        client.start()
    time.sleep(2)
    # A Service has forgotten the pod by then; others are served for as long.
    threading.Timer(running.serves_on - 1, over.set).start()
    began = time.monotonic()
    status = running.terminate()
    print(f"{title}: {status} after {time.monotonic() - began:.1f} s; answers: {dict(seen)}")
    for client in clients:
        client.join()
    if status != 0 or running.restarted:
        yield f"{title} ended with {status} (None: killed), restarted: {running.restarted}"
    if not environment and set(seen) != {200}:
        yield f"{title}: requests were lost while it was leaving: {seen}"


def _ask(pod: Pod, seen: Counter[int], over: threading.Event) -> None:
    with httpx.Client(base_url=pod.url, timeout=60) as client:
        while not over.is_set():
            try:
                seen[client.post("/v1/embeddings", json={"input": "x"}).status_code] += 1
            except httpx.HTTPError:
                seen[0] += 1


def _of_a_lost_device(pod: dict[str, Any], folder: Path, fake: dict[str, str]) -> Iterator[str]:
    lost = folder / "device-lost"
    env = {**fake, "NV_EMBED_RUNNER": f"{RUNNERS}LosesItsDevice", "FAKE_DEVICE_LOST": str(lost)}
    running = Pod(pod, folder / "pod-log", **env)
    if not running.ready.wait(PATIENCE_S):
        running.terminate()
        yield f"a pod does not become ready: {running.log.read_text()}"
        return
    lost.touch()
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children")
    os.kill(int(children.read_text().split()[0]), 9)
    deadline = time.monotonic() + PATIENCE_S
    while running.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    ended = running.process.poll()
    running.terminate()
    print(f"a pod whose device was lost ended with {ended}")
    if ended != 1:
        yield f"a pod whose device was lost did not end: {ended}"
