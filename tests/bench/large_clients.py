"""Who asks in the benchmark of large requests: clients that fetch, and probes beside them.

Blocking sockets in threads, and as little work as possible: each side runs in a process of its own.
Knows neither servers nor tables.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

_PAUSE_S = 0.003
_READ = 1 << 18
_TIMEOUT_S = 60

Address = tuple[str, int]


@dataclass(slots=True)
class Fetched:
    """What the clients got in the time that they had."""

    statuses: Counter[int] = field(default_factory=Counter)
    megabytes: float = 0.0


@dataclass(slots=True)
class Waits:
    """What a probe waited, in milliseconds, one of each for an answer."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of the front's processor time: what other programs on the machine take is not in it."""
    slept: list[float] = field(default_factory=list)
    """By which the pause before was too long."""


def request(method: str, path: str, body: bytes = b"") -> bytes:
    """The bytes of a request."""
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def fetch(address: Address, requests: Sequence[bytes], seconds: float, core: int) -> Fetched:
    """A client for each of the requests sends it again and again, and yields to the probes."""
    os.sched_setaffinity(0, {core})
    os.nice(10)
    found = Fetched()
    end = time.monotonic() + seconds

    def client(content: bytes) -> None:
        buffer = memoryview(bytearray(_READ))
        with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
            while time.monotonic() < end:
                connection.sendall(content)
                status, size = _answer(connection, buffer, end)
                found.statuses[status] += 1
                found.megabytes += size / 1e6

    with ThreadPoolExecutor(max(1, len(requests))) as pool:
        list(pool.map(client, requests))
    return found


def probe(
    address: Address, requests: Mapping[str, bytes], seconds: float, core: int, front: int
) -> dict[str, Waits]:
    """Each of the requests a few milliseconds after its last answer, by a thread of its own.

    front: the process that answers. -> what they waited, by the requests' names.
    """
    os.sched_setaffinity(0, {core})
    clock = (~front << 3) | 2  # of another process: clock_getcpuclockid(3), which Python lacks
    end = time.monotonic() + seconds

    def ask(content: bytes) -> Waits:
        waits, buffer = Waits(), memoryview(bytearray(_READ))
        with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
            while (begin := time.monotonic()) < end:
                begin_cpu = time.clock_gettime(clock)
                connection.sendall(content)
                status, _ = _answer(connection, buffer)
                assert status == 200, status
                answered = time.monotonic()
                waits.wall.append(1000 * (answered - begin))
                waits.cpu.append(1000 * (time.clock_gettime(clock) - begin_cpu))
                time.sleep(_PAUSE_S)
                waits.slept.append(1000 * (time.monotonic() - answered - _PAUSE_S))
        return waits

    with ThreadPoolExecutor(len(requests)) as pool:
        return dict(zip(requests, pool.map(ask, requests.values()), strict=True))


def _answer(
    connection: socket.socket, buffer: memoryview, end: float = float("inf")
) -> tuple[int, int]:
    """Read one answer, unless the time ends before. -> (its status, its bytes)"""
    size = connection.recv_into(buffer)
    assert size, "the server closed the connection"
    head, _, _ = bytes(buffer[:size]).lower().partition(b"\r\n\r\n")
    _, found, value = head.partition(b"content-length: ")
    whole = len(head) + 4 + int(value.split(b"\r\n")[0]) if found else 0
    last = bytes(buffer[max(size - 5, 0) : size])
    while (size < whole if whole else last != b"0\r\n\r\n") and time.monotonic() < end:
        got = connection.recv_into(buffer)
        assert got, "the server closed the connection amid an answer"
        size += got
        last = (last + bytes(buffer[max(got - 5, 0) : got]))[-5:]
    return int(head.split(b" ", 2)[1]), size
