"""Ten times what the server can do: it does all that it can, and says no to the rest at once."""

from __future__ import annotations

import json
import random
import re
import statistics
import threading
import time
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.chaos.load import Load, address, finish_load, rss_bytes, start_load
from tests.chaos.test_faults import FULL
from tests.server.processes import ServerProcess, serving
from tests.server.questions import RUNNERS, WORDS

pytestmark = [pytest.mark.timing, pytest.mark.alone]

RATE, SIZE = (200.0, 8) if FULL else (400.0, 16)
"""Inputs a second that the runner does, and those of a request: 250 requests a second leave the
machine's two cores time for others."""
SECONDS, PEAK_S = (31.0, 9.0) if FULL else (4.0, 3.0)
PROBES = 3100 if FULL else 800
GOODPUT = 0.95 if FULL else 0.9
"""Of the peak. In the short form one batch is 4 % of what is counted."""
OPTIONS = (
    *("--runner", RUNNERS + "Paced", "--no-access-log"),
    # 300,000 tokens, the least that is allowed, are 3 or 6 s of work; a batch is 0.08 or 0.16 s.
    *("--max-queued-tokens", "300000", "--max-batch-tokens", "8192"),
)


def texts(size: int, count: int = 8) -> list[list[str]]:
    """Requests of `size` texts of about 250 tokens."""
    dice = random.Random(21)
    return [[" ".join(dice.choices(WORDS, k=172)) for _ in range(size)] for _ in range(count)]


def load(server: ServerProcess, checkpoint: Path, **options: float) -> Load:
    return Load(*address(server), str(checkpoint), texts(SIZE), "golden-embed", **options)


class SdkClient(threading.Thread):
    """An OpenAI client that comes in the middle, with nothing but the SDK's own retries."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.statuses: list[int] = []
        self.answers = 0

    def run(self) -> None:
        hooks = {"response": [lambda answer: self.statuses.append(answer.status_code)]}
        with httpx.Client(event_hooks=hooks) as http:
            client = OpenAI(
                base_url=f"{self._url}/v1", api_key="none", max_retries=30, http_client=http
            )
            # Too many to slip into the gap that a batch leaves in the queue.
            answer = client.embeddings.create(model="golden-embed", input=texts(64, 1)[0])
            self.answers = len(answer.data)


def latency_buckets(server: ServerProcess) -> dict[float, float]:
    """Upper bound -> requests that took at most so long."""
    text = server.client.get("/metrics").text
    found = re.findall(r'^nv_embed_request_duration_seconds_bucket{le="(.+)"} (\S+)$', text, re.M)
    return {float(bound): float(count) for bound, count in found}


def quantile(buckets: dict[float, float], part: float) -> float:
    """As Prometheus' histogram_quantile."""
    rank = part * buckets[float("inf")]
    lower, below = 0.0, 0.0
    for upper, count in buckets.items():
        if count >= rank:
            return lower + (upper - lower) * (rank - below) / (count - below)
        lower, below = upper, count
    raise AssertionError(buckets)


def test_ten_times_overload(golden_checkpoint: Path, tmp_path: Path) -> None:
    env = {"FAKE_RATE": str(RATE)}
    with serving(golden_checkpoint, *OPTIONS, log=tmp_path / "log", env=env) as server:
        quiet = load(
            server, golden_checkpoint, seconds=PEAK_S, connections=128 // SIZE
        )  # it is never idle
        peak = finish_load(start_load(quiet))
        before = server.metric("nv_embed_inputs_total")
        latency_before = latency_buckets(server)
        print("peak:", json.dumps(peak))
        assert peak["statuses"].keys() == {"200"}

        flood = load(
            server,
            golden_checkpoint,
            seconds=SECONDS,
            rate=10 * RATE / SIZE,
            probes_per_s=PROBES / SECONDS,
        )
        running = start_load(flood)
        memory: list[int] = []
        sdk = SdkClient(server.url)
        middle = time.monotonic() + SECONDS / 2
        while running.poll() is None:
            memory.append(rss_bytes(server.process.pid))
            if time.monotonic() > middle and not sdk.ident:
                sdk.start()
            time.sleep(0.1)
        seen = finish_load(running)
        sdk.join(60)
        print("overload:", json.dumps(seen))
        print("SDK:", sdk.statuses, "front, MB:", memory[0] // 2**20, max(memory) // 2**20)

        assert seen["late_s"]["p50"] < 10, "the generator itself is too slow for this test"
        assert seen["sent_per_s"] > 9.5 * RATE / SIZE
        assert seen["statuses"].keys() == {"200", "429"}
        assert seen["wrong"] == 0
        # No input was embedded in vain: each belongs to an answer.
        embedded = server.metric("nv_embed_inputs_total") - before
        assert embedded == SIZE * seen["statuses"]["200"] + sdk.answers
        assert seen["bad_refusals"] == 0
        assert seen["inputs_per_s"] >= GOODPUT * peak["inputs_per_s"]
        slice_ms = 0 if FULL else 5  # 600 probes are few beside one pause of a busy machine
        assert seen["refusal_s"]["p99"] <= 2 * seen["probe_s"]["p99"] + slice_ms
        assert sdk.statuses[-1] == 200
        assert set(sdk.statuses[:-1]) == {429}
        assert sdk.answers == 64
        # Full after a second; from then on there is no reason to grow.
        # What the panel shows is what those waited who got vectors: refusals are not among them.
        after = latency_buckets(server)
        waited = {le: count - latency_before[le] for le, count in after.items()}
        shown = {p: quantile(waited, p) for p in (0.5, 0.99)}
        print("latency panel:", shown, "clients:", seen["answer_s"])
        assert shown[0.99] >= 0.8 * seen["answer_s"]["p99"] / 1000
        assert shown[0.5] >= 0.5 * seen["answer_s"]["p50"] / 1000
        half = len(memory) // 2
        assert statistics.median(memory[half:]) < 1.1 * statistics.median(memory[half // 2 : half])
        server.wait_for_metric("nv_embed_queued_tokens", 0)
