"""Bodies of any shape within the limits: what they cost the others, and the front's memory.

The search draws shapes; a process of its own asks for /livez all the while. How long that took is
asserted at length only (`CHAOS=full`, on a machine that does nothing else); what is answered, and
the memory, always.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chaos.load import address
from tests.chaos.test_faults import FULL
from tests.checkpoints import claim_width
from tests.server.processes import ROOT, ServerProcess, serving

LIMIT = 32 * 2**20 if FULL else 2**20  # bytes of the largest body
EXAMPLES = 300 if FULL else 100
MAX_LIVEZ_S = 0.1
FRONT_BYTES = 100e6  # beyond what it has when idle
BYTES_FOR_BYTES = 5

ITEMS = [
    *(b'""', b'"a"', b"0", b"12345", b"-1.5e3", b"null", b"true", b"NaN", b"[]", b"[0]", b"{}"),
    *(b'{"":0}', b"[1,2]", b"[1, 315, 2]", b"[[[[]]]]", b'["a"]', b'"\\n\\n"', rb'"\ud83d"'),
    *('"🙂"'.encode(), b'"' + b"word " * 50 + b'"', b'"' + b"x" * 17_000 + b'"', b"  1 \n "),
]
CHARACTERS = [
    *(b"a", b" ", b"word ", b"\\n", b"\\u0041", rb"\u0416", rb"\ud83d\ude42", rb"\ud83d", b"\\\\"),
    *(b'\\"', b"\x7f", "é".encode(), "字".encode(), "🙂".encode(), "\ufdfa".encode()),
    *("e\u0301".encode(), b"[", b"],", b"0,", b"</s>", b"\xff"),
]
NAMES = [b"input", b"prompt", b"instruction", b"model", b"user", b"x", b"dimensions", b"truncate"]


@dataclass(frozen=True, slots=True)
class Shape:
    """A request; `body()` is made late, so that hypothesis need not keep it."""

    path: str
    name: bytes  # of the field that is large
    kind: str
    unit: bytes
    last: bytes
    size: int
    extra: bytes

    def body(self) -> bytes:
        comma = self.kind not in ("text", "deep", "spaces")
        unit = self.unit + b"," * comma
        many = unit * (self.size // len(unit))
        value = {
            "text": b'"%b%b"' % (many, self.last),
            "list": b"[%b%b]" % (many, self.last),
            "list in a list": b"[[%b%b]]" % (many, self.last),
            "object": b'{"a":[%b%b]}' % (many, self.last),
            "deep": self.unit * (self.size // len(self.unit)),
            "spaces": b" " * self.size + b'"a"',
        }[self.kind]
        fields = {b"model": b'"golden-embed"', b"input": b'"a"', self.name: value}
        inside = b",".join(b'"%b":%b' % item for item in fields.items())
        return b"{%b%b}" % (self.extra, inside)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    kind = draw(st.sampled_from(["text", "list", "list in a list", "object", "deep", "spaces"]))
    units = CHARACTERS if kind == "text" else ITEMS
    if kind == "deep":
        units = [b"[", b'{"a":', b"[[],", b'[{"":']
    sizes = st.sampled_from([LIMIT - 2**16, LIMIT // 8, 2**16, 2**16 + 1, 2**12]) | st.integers(
        1, LIMIT - 2**16
    )
    extras = [b"", b'"truncate":"END",', b'"truncate":"START",', b'"encoding_format":"base64",']
    return Shape(
        draw(st.sampled_from(["/v1/embeddings", "/tokenize"])),
        draw(st.sampled_from(NAMES) if draw(st.booleans()) else st.just(b"input")),
        kind,
        draw(st.sampled_from(units)),
        draw(st.sampled_from(units)),
        draw(sizes),
        draw(st.sampled_from(extras)),
    )


class Prober:
    """Asks for /livez from another process, every few milliseconds, and notes how long it took."""

    PROGRAM = (
        "import http.client, sys, time\n"
        "client = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=60)\n"
        "while True:\n"
        "    begin = time.monotonic()\n"
        "    client.request('GET', '/livez')\n"
        '    assert client.getresponse().read() == b\'{"status":"ok"}\'\n'
        "    print(begin, time.monotonic() - begin, flush=True)\n"
        "    time.sleep(0.002)\n"
    )

    def __init__(self, server: ServerProcess, notes: Path) -> None:
        host, port = address(server)
        self._notes = notes
        with notes.open("wb") as file:
            command = [sys.executable, "-c", self.PROGRAM, host, str(port)]
            self.process = subprocess.Popen(command, stdout=file, cwd=ROOT)
        self._read = 0

    def worst(self) -> tuple[int, float]:
        """How many there were since the last call, and the longest."""
        text = self._notes.read_text()
        whole = text[self._read : text.rfind("\n") + 1]
        self._read += len(whole)
        seconds = [float(line.split()[1]) for line in whole.splitlines()]
        return len(seconds), max(seconds, default=0.0)

    def stop(self) -> None:
        assert self.process.poll() is None, "it got a wrong answer"
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """4,096 values for each input, and the real limits."""
    folder = tmp_path_factory.mktemp("shapes")
    model = claim_width(golden_checkpoint, folder / "golden-embed", 4096)
    with serving(model, "--runner", "tests.server.runners:Wide", log=folder / "log") as server:
        yield server


@pytest.fixture(scope="module")
def prober(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prober]:
    prober = Prober(server, tmp_path_factory.mktemp("prober") / "notes")
    yield prober
    prober.stop()


@pytest.fixture(scope="module")
def idle_bytes(server: ServerProcess) -> int:
    assert server.embed(input="x").status_code == 200
    return peak_bytes(server, reset=True)


def peak_bytes(server: ServerProcess, *, reset: bool = False) -> int:
    """The most memory that the front had since the last reset."""
    process = Path(f"/proc/{server.process.pid}")
    if reset:
        (process / "clear_refs").write_text("5")
    lines = (process / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def send(server: ServerProcess, path: str, body: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=not FULL,
)
@given(shapes())
def test_no_shape_stops_the_others(
    server: ServerProcess, prober: Prober, idle_bytes: int, shape: Shape
) -> None:
    body = shape.body()
    peak_bytes(server, reset=True)
    prober.worst()
    begin = time.monotonic()
    status, content = send(server, shape.path, body)
    taken = time.monotonic() - begin
    assert status in (200, 400, 404), (status, content[:300])
    if status == 200:
        assert json.loads(content)["object"] == "list"
    else:
        error = json.loads(content)["error"]
        assert error["type"] == "invalid_request_error"
        assert len(content) < 1000
    peak = peak_bytes(server)
    allowed = idle_bytes + FRONT_BYTES + BYTES_FOR_BYTES * len(body)
    assert peak <= allowed, f"{shape}: {peak / 1e6:.0f} MB for {len(body) / 1e6:.1f}"
    count, worst = prober.worst()
    if FULL:
        assert count or taken < MAX_LIVEZ_S, "the prober was not answered at all"
        assert worst <= MAX_LIVEZ_S, f"{shape}: /livez took {worst:.3f} s"


@pytest.mark.skipif(not FULL, reason="at length only: it holds two cores for a while")
@pytest.mark.parametrize("encoding_format", ["float", "base64"])
@pytest.mark.parametrize("clients", [1, 4])
def test_large_answers_stop_nobody(
    server: ServerProcess, prober: Prober, encoding_format: str, clients: int
) -> None:
    """2,048 inputs of 4,096 values: 100 MB as floats."""

    def ask(client: int) -> int:
        inputs = [f"{encoding_format} {client} {n}" for n in range(2048)]
        fields = {"model": "golden-embed", "input": inputs, "encoding_format": encoding_format}
        return send(server, "/v1/embeddings", json.dumps(fields).encode())[0]

    prober.worst()
    with ThreadPoolExecutor(clients) as pool:
        assert list(pool.map(ask, range(clients))) == [200] * clients
    count, worst = prober.worst()
    assert count
    assert worst <= MAX_LIVEZ_S, f"/livez took {worst:.3f} s"
