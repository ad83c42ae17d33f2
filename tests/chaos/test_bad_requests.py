"""Generated bad requests at a real server: never a 5xx, never a hang, never a restart."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.test_faults import FULL
from tests.server.processes import ServerProcess, serving

REQUESTS = 20_000 if FULL else 1_500
ODD_TEXTS = [
    *("", " ", "\0", "\t\n", "é" * 5, "🙂" * 300, "</s>", "<s>", "\u202e", "\ufeff", "%s%n"),
    *("a" * 100_000, "NaN", "null", "𝕬" * 10, "\x7f", "١٢٣", "Instruct: x\nQuery: "),
]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 31999, 32000, 2**31, 2**63, 10**40, 1.5, -0.0, 1e308),
    *([], [[]], [None], [True], ["a", 1], [1, 315, 2], [[1, 315, 2]], [1], [2], [1, 1, 2]),
    *([-1, 2], [1, 40_000, 2], ["x"] * 2049, [[1, 2]] * 3, {}, {"a": {}}, [[["x"]]], ["", "a"]),
]
FIELDS = [
    *("model", "input", "encoding_format", "dimensions", "user", "prompt", "instruction", "task"),
    *("input_type", "truncate", "truncate_prompt_tokens", "prompt_name", "truncation", "surprise"),
]
GOOD: dict[str, list[Any]] = {
    "model": ["golden-embed", "golden-embed-query"],
    "input": ["text", ["a", "b"], [1, 315, 2], [[1, 315, 2]]],
    "encoding_format": ["float", "base64"],
    "dimensions": [64],
    "task": ["NQ", "STS"],
    "input_type": ["query", "passage"],
    "truncate": ["END", "START", True],
}
BROKEN = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model":', b"{'a':1}", b"[" * 5000]
BROKEN += [b'{"input":"\\ud800","model":"golden-embed"}', b'{"a":' * 2000, b'{"input": NaN}']
BROKEN += [b'{"model":"golden-embed","input":"a","input":5}', b"\0" * 100, b'{"a":1}{"b":2}']


def bodies(dice: random.Random, count: int) -> Iterator[bytes]:
    """Bodies of which most are wrong in one or more fields, or are no JSON at all."""
    for _ in range(count):
        if dice.random() < 0.15:
            body = bytearray(dice.choice(BROKEN))
            for _ in range(dice.randint(0, 3)):
                body[dice.randint(0, len(body)) :] += bytes([dice.randrange(256)])
            yield bytes(body)
            continue
        fields = {name: dice.choice(GOOD[name]) for name in ("model", "input")}
        for name in dice.sample(FIELDS, dice.randint(1, 4)):
            pool = dice.choice([ODD_TEXTS, ODD_VALUES, GOOD.get(name, ["x"])])
            fields[name] = dice.choice(pool)
        if dice.random() < 0.1:
            fields.pop(dice.choice(["model", "input"]))
        yield json.dumps(fields).encode()


def check_alive(server: ServerProcess, workers: list[int]) -> None:
    assert server.process.poll() is None
    assert server.worker_pids() == workers, "a worker was restarted"
    assert server.embed(input="x").status_code == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize("runner", [None, "tests.server.runners:Hashing"])
def test_generated_bodies(golden_checkpoint: Path, tmp_path: Path, runner: str | None) -> None:
    """A vector where it is legal, else a 4xx in the envelope. Half of them on the real model."""
    options = ("--runner", runner) if runner else ()
    dice = random.Random(31)
    headers = {"content-type": "application/json"}
    statuses: dict[int, int] = {}
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        workers = server.worker_pids()
        for body in bodies(dice, REQUESTS // 2):
            answer = server.client.post(
                dice.choice(["/v1/embeddings", "/v1/embeddings", "/tokenize"]),
                content=body,
                headers=headers,
                timeout=20,
            )
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 404), (answer.status_code, body[:300])
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert error["type"] == "invalid_request_error"
        check_alive(server, workers)
    assert statuses[200] > 0
    assert statuses[400] > REQUESTS // 10


def test_raw_bytes(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Mutated requests on the socket: an answer or a closed connection, in time."""
    dice = random.Random(32)
    body = b'{"model":"golden-embed","input":"x"}'
    good = (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
    ) + body
    options = ("--runner", "tests.server.runners:Hashing", "--header-timeout", "0.3")
    options += ("--body-timeout", "0.3")
    with serving(golden_checkpoint, *options, log=tmp_path / "log") as server:
        workers = server.worker_pids()
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(REQUESTS // 20):
            raw = bytearray(good)
            for _ in range(dice.randint(1, 5)):
                at = dice.randrange(len(raw))
                raw[at : at + dice.randint(0, 3)] = bytes(
                    dice.randrange(256) for _ in range(dice.randint(0, 4))
                )
            with socket.create_connection((host, int(port)), timeout=10) as client:
                client.sendall(raw)
                answer = client.recv(65536)  # or b"": closed; nothing at all would time out
            assert not answer.startswith(b"HTTP/1.1 5"), (bytes(raw), answer[:500])
        check_alive(server, workers)
