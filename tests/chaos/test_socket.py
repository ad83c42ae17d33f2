"""Message boundaries at a real server: two legal requests, framed, offered, split and cut off in
every way that comes to mind.

Always the right answers in their order, or behind them one refusal and a closed connection; never a
second answer to one request, never a connection older than its time limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httptools
import numpy as np
import pytest

from tests.chaos.load import address
from tests.chaos.test_faults import FULL
from tests.server.processes import serving
from tests.server.questions import RUNNERS, Questions
from tests.server.runners import vector_of

pytestmark = pytest.mark.timing

CASES = 10_000 if FULL else 400
AT_ONCE = 150
LIMIT_S = 3.0
"""The time limit of heads and of bodies."""
OLDEST_S = LIMIT_S + 1 + 5
"""How long a connection may last after its last byte: a time limit, the second of lingering, and
what a busy machine adds."""
INNER = b"GET /info HTTP/1.1\r\nhost: inner\r\n\r\n"
"""What nobody may take for a request: it is the body of one, or a part of it."""
OFFERS = ["h2c", "TLS/1.2", "websocket", "foo", "foo/2, h2c", "HTTP/2.0"]
TRAILERS = ["authorization: Bearer x", "content-type: text/plain", "host: y", "x-request-id: t"]

POST = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
SMUGGLED = {
    "both framings": POST + b"content-length: 4\r\n" + CHUNKED + b"0\r\n\r\n" + INNER,
    "both, the other way": POST + CHUNKED[:-2] + b"content-length: 4\r\n\r\n0\r\n\r\n" + INNER,
    "two lengths": POST + b"content-length: 0\r\ncontent-length: 35\r\n\r\n" + INNER,
    "one length twice": POST + b"content-length: 35\r\ncontent-length: 35\r\n\r\n" + INNER,
    "a list of lengths": POST + b"content-length: 35, 35\r\n\r\n" + INNER,
    "a signed length": POST + b"content-length: +35\r\n\r\n" + INNER,
    "a negative length": POST + b"content-length: -1\r\n\r\n" + INNER,
    "a hexadecimal length": POST + b"content-length: 0x23\r\n\r\n" + INNER,
    "a length beyond 64 bits": POST + b"content-length: 18446744073709551651\r\n\r\n" + INNER,
    "no length": POST + b"content-length:\r\n\r\n" + INNER,
    "two digits apart": POST + b"content-length: 3 5\r\n\r\n" + INNER,
    "chunked, then another": POST + b"transfer-encoding: chunked, x\r\n\r\n0\r\n\r\n" + INNER,
    "not chunked": POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER,
    "packed, then chunked": POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + INNER,
    "quoted chunked": POST + b'transfer-encoding: "chunked"\r\n\r\n0\r\n\r\n' + INNER,
    "an empty coding": POST + b"transfer-encoding:\r\ncontent-length: 35\r\n\r\n" + INNER,
    "identity": POST + b"transfer-encoding: identity\r\n\r\n" + INNER,
    "a space before the colon": POST + b"content-length : 35\r\n\r\n" + INNER,
    "a tab before the colon": POST + b"transfer-encoding\t: chunked\r\n\r\n0\r\n\r\n" + INNER,
    "a folded line": POST + b"x: y\r\n content-length: 35\r\n\r\n" + INNER,
    "a folded coding": POST + b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + INNER,
    "a bare line feed": POST + b"x: y\ncontent-length: 35\r\n\r\n" + INNER,
    "a bare carriage return": POST + b"x: y\rcontent-length: 35\r\n\r\n" + INNER,
    "blank line without returns": POST + b"content-length: 35\n\n" + INNER,
    "a NUL": POST + b"x: \0\r\ncontent-length: 35\r\n\r\n" + INNER,
    "a line without a name": POST + b": y\r\n\r\n" + INNER,
    "a line without a colon": POST + b"content-length\r\n\r\n" + INNER,
    "a name with a parenthesis": POST + b"content-length(): 35\r\n\r\n" + INNER,
    "an overflowing chunk": POST + CHUNKED + b"10000000000000023\r\n" + INNER,
    "a negative chunk": POST + CHUNKED + b"-1\r\n" + INNER,
    "a signed chunk": POST + CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n" + INNER,
    "a chunk in 0x": POST + CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n" + INNER,
    "a chunk that is longer": POST + CHUNKED + b"2\r\nhello\r\n0\r\n\r\n" + INNER,
    "a chunk after a line feed": POST + CHUNKED + b"5\nhello\r\n0\r\n\r\n" + INNER,
    "a chunk that ends in a line feed": POST + CHUNKED + b"5\r\nhello\n0\r\n\r\n" + INNER,
    "a space before the extension": POST + CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n" + INNER,
    "a length in the trailers": POST + CHUNKED + b"0\r\ncontent-length: 35\r\n\r\n" + INNER,
    "no version": b"GET /info\r\n\r\n",
    "no host": b"GET /info HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /info HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    "two authorizations": POST + b"authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
    "the other HTTP": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": b"CONNECT inner:80 HTTP/1.1\r\nhost: inner:80\r\n\r\n" + INNER,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}
"""Each gets a 400, and nothing behind it is served."""


@dataclass(frozen=True, slots=True)
class Message:
    """A legal request and its right answer."""

    raw: bytes
    is_right: Callable[[int, bytes], bool]
    early: bool
    """It is answered without its body."""


class Writer:
    """Legal requests in all their forms."""

    def __init__(self, checkpoint: Path, dice: random.Random) -> None:
        self._questions, self._dice = Questions(checkpoint, seed=71), dice

    def message(self, *lines: str) -> Message:
        kind = self._dice.choice(["embed", "embed", "embed", "early", "get"])
        if kind == "embed":
            inputs, ids = self._questions.request()
            inputs, ids = inputs[:3], ids[:3]
            between = self._dice.choice([None, (",\r\n\r\n", ":"), (",", ":\r\n\r\n\r\n")])
            body = json.dumps({"model": "golden-embed", "input": inputs}, separators=between)
            right = np.stack([vector_of(one) for one in ids])
            return self._framed("POST /v1/embeddings", body.encode(), lines, answers(right), False)
        if kind == "early":
            body = self._dice.choice([INNER, INNER * 40, b"0\r\n\r\n" + INNER, b""])
            return self._framed("POST /nowhere", body, lines, lambda status, _: status == 404, True)
        body = self._dice.choice([b"", b"", INNER])
        return self._framed("GET /livez", body, lines, lambda status, _: status == 200, True)

    def _framed(
        self,
        start: str,
        body: bytes,
        more: Sequence[str],
        is_right: Callable[[int, bytes], bool],
        early: bool,
    ) -> Message:
        dice = self._dice
        lines = ["Host: x", "content-type: application/json", "accept: */*", *more]
        if dice.random() < 0.4:
            tokens = ["upgrade", *dice.sample(["keep-alive", "HTTP2-Settings"], dice.randrange(3))]
            lines += [f"Connection: {', '.join(tokens)}", f"Upgrade: {dice.choice(OFFERS)}"]
        if body and not early and dice.random() < 0.1:
            lines.append("expect: 100-continue")
        chunked = dice.random() < 0.5
        if chunked and body:
            lines.append("Transfer-Encoding: chunked")
            body = self._chunks(body)
        elif body or dice.random() < 0.5:
            lines.append(f"Content-Length: {len(body)}")
        dice.shuffle(lines)
        head = "\r\n".join([f"{start} HTTP/1.1", *lines, "", ""])
        return Message(head.encode() + body, is_right, early)

    def _chunks(self, body: bytes) -> bytes:
        dice, sent = self._dice, b""
        while body:
            size = min(dice.choice([1, 3, 16, 200, 5000]), len(body))
            extension = dice.choice([b"", b"", b";a", b';a="b;c"'])
            sent += b"%x%s\r\n%s\r\n" % (size, extension, body[:size])
            body = body[size:]
        trailers = dice.sample(TRAILERS, dice.choice([0, 0, 1, 3]))
        return sent + "\r\n".join(["0", *trailers, "", ""]).encode()

    def pieces(self, stream: bytes) -> list[bytes]:
        """Split at random: into one, a few, or byte by byte around somewhere."""
        dice, size = self._dice, len(stream)
        cuts = set(dice.choices(range(size + 1), k=dice.choice([0, 0, 1, 2, 5])))
        if dice.random() < 0.2:
            start = dice.randrange(size)
            cuts |= set(range(start, min(start + 25, size)))
        edges = [0, *sorted(cuts), size]
        return [stream[a:b] for a, b in itertools.pairwise(edges) if a < b]


def answers(right: np.ndarray) -> Callable[[int, bytes], bool]:
    def is_right(status: int, body: bytes) -> bool:
        if status != 200:
            return False
        got = np.array([item["embedding"] for item in json.loads(body)["data"]], dtype=np.float32)
        return got.shape == right.shape and bool(np.allclose(got, right, rtol=0, atol=1e-6))

    return is_right


def refusal(status: int) -> Callable[[int, bytes], bool]:
    return lambda got, body: got == status and b'"invalid_request_error"' in body


@dataclass(frozen=True, slots=True)
class Case:
    """What is sent, which answers come, and whether the server then closes."""

    kind: str
    pieces: list[bytes]
    right: list[Callable[[int, bytes], bool]]
    closes: bool


def case(writer: Writer, dice: random.Random) -> Case:
    first, second, last = writer.message(), writer.message(), writer.message("connection: close")
    between = dice.choice([b"", b"", b"", b"\r\n"])
    stream = dice.choice([b"", b"", b"\r\n"]) + first.raw + between + second.raw
    kind = dice.choice(["whole", "whole", "half", "smuggled", "last"])
    if kind == "half":
        cut = dice.randrange(len(stream))
        right = []
        start = stream.index(first.raw)
        rest = stream[:cut]
        for message in (first, second):
            end = start + len(message.raw)
            if cut >= end:
                right.append(message.is_right)
                rest, start = stream[end:cut], end + len(between)
            elif b"\r\n\r\n" in stream[start:cut] and message.early:
                right.append(message.is_right)  # and no refusal: it has been answered
                break
            else:
                if rest.strip(b"\r\n"):
                    right.append(refusal(408))
                break
        idle = not rest.strip(b"\r\n") and bool(right)  # the server would keep it longer
        return Case(kind, writer.pieces(stream[:cut]) if cut else [], right, not idle)
    right = [first.is_right, second.is_right]
    if kind == "smuggled":
        name = dice.choice(list(SMUGGLED))
        pieces = writer.pieces(stream + SMUGGLED[name])
        return Case(f"{kind}: {name}", pieces, [*right, refusal(400)], True)
    if kind == "last":
        pieces = writer.pieces(stream + last.raw + INNER)
        return Case(kind, pieces, [*right, last.is_right], True)
    return Case(
        kind, writer.pieces(stream + INNER), [*right, lambda status, _: status == 200], False
    )


class Client:
    """Takes every answer on one connection."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, bytes]] = []
        self.closed = False
        self._body = b""
        self._parser = httptools.HttpResponseParser(self)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() != 100:
            self.answers.append((self._parser.get_status_code(), self._body))
        self._body = b""

    async def talk(self, host: str, port: int, case: Case) -> float:
        """Seconds from the last byte to the last answer, or to the end where one is expected."""
        reader, writer = await asyncio.open_connection(host, port)
        reading = asyncio.create_task(self._read(reader, case))
        with contextlib.suppress(ConnectionError):
            for piece in case.pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
        sent = time.monotonic()
        try:
            async with asyncio.timeout(4 * OLDEST_S):
                await reading
        except TimeoutError:
            pass
        finally:
            writer.close()
        return time.monotonic() - sent

    async def _read(self, reader: asyncio.StreamReader, case: Case) -> None:
        while case.closes or len(self.answers) < len(case.right):
            try:
                data = await reader.read(65536)
            except ConnectionError:
                data = b""
            if not data:
                self.closed = True
                return
            self._parser.feed_data(data)


async def run_all(cases: list[Case], host: str, port: int) -> Counter[str]:
    gate, seen = asyncio.Semaphore(AT_ONCE), Counter[str]()

    async def one(number: int, case: Case) -> None:
        async with gate:
            client = Client()
            seconds = await client.talk(host, port, case)
        told = (number, case.kind, case.pieces, client.answers, client.closed, seconds)
        assert len(client.answers) == len(case.right), told
        for is_right, answer in zip(case.right, client.answers, strict=True):
            assert is_right(*answer), told
        assert client.closed == case.closes, told
        assert seconds < OLDEST_S, told
        seen[case.kind.split(":")[0]] += 1

    await asyncio.gather(*(one(number, case) for number, case in enumerate(cases)))
    return seen


OPTIONS = ("--runner", RUNNERS + "Hashing", "--no-access-log")
OPTIONS += ("--header-timeout", str(LIMIT_S), "--body-timeout", str(LIMIT_S))


def test_any_splits_of_legal_requests_get_their_answers(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    dice = random.Random(72)
    writer = Writer(golden_checkpoint, dice)
    cases = [case(writer, dice) for _ in range(CASES)]
    with serving(golden_checkpoint, *OPTIONS, log=tmp_path / "log") as server:
        workers = server.worker_pids()
        seen = asyncio.run(run_all(cases, *address(server)))
        assert seen.keys() == {"whole", "half", "smuggled", "last"}
        server.wait_for_metric("nv_embed_running_requests", 0)
        server.wait_for_metric("nv_embed_inflight_bytes", 0)
        assert server.worker_pids() == workers
        assert server.metric("nv_embed_worker_deaths_total") == 0
        assert server.embed(input="x").status_code == 200


@pytest.mark.parametrize("offered", [False, True])
def test_smuggling_shapes(golden_checkpoint: Path, tmp_path: Path, offered: bool) -> None:
    """Each alone and whole, then split in two at each of its bytes in turn; an offer to upgrade
    beside it changes nothing."""
    offer = b"connection: upgrade\r\nupgrade: h2c\r\nhost: x" if offered else b"host: x"
    cases = []
    for name, raw in SMUGGLED.items():
        shape = raw.replace(b"host: x", offer)
        for cut in range(0, len(shape), 1 if FULL else 31):
            pieces = [piece for piece in (shape[:cut], shape[cut:]) if piece]
            cases.append(Case(name, pieces, [refusal(400)], True))
    with serving(golden_checkpoint, *OPTIONS, log=tmp_path / "log") as server:
        asyncio.run(run_all(cases, *address(server)))
