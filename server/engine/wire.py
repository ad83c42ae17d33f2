"""The frames between the front and a worker. Pure: bytes from values, and back.

A frame is a header (kind, batch id, rows, faults, payload bytes; five little-endian uint32) and
a payload:

START   front → worker  JSON: RunnerOptions, the runner's name, log settings
HELLO   worker → front  JSON: RunnerInfo, tokens a second (0: unknown); warmed up and ready
REFUSED worker → front  JSON: why it cannot start, and whether trying again may help
BATCH   front → worker  lengths int32 [N], pool starts and ends int32 [N], ids int32 [T]; a length
                        of 0: the ids of the one before; an end of 0: behind the last
ROWS    worker → front  float32 [N, D], then int32 (row, Fault) for each row that is no vector
FAILED  worker → front  the error's text, for the log
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum

import numpy as np
import orjson
from numpy.typing import NDArray

from model.batch import Encoding, RunnerInfo, RunnerOptions, Span, continues

HEADER = struct.Struct("<5I")


class Kind(IntEnum):
    START = 1
    HELLO = 2
    REFUSED = 3
    BATCH = 4
    ROWS = 5
    FAILED = 6


class Fault(IntEnum):
    """Why a row of an answer is no vector."""

    NOT_FINITE = 1
    NO_MEMORY = 2  # this input alone does not fit into the device's memory


def frame(
    kind: Kind, payload: bytes = b"", *, batch_id: int = 0, rows: int = 0, faults: int = 0
) -> bytes:
    return HEADER.pack(kind, batch_id, rows, faults, len(payload)) + payload


def batch_frame(batch_id: int, encodings: Sequence[Encoding]) -> bytes:
    own = [
        None if continues(encoding, before) else encoding.ids
        for encoding, before in zip(encodings, (None, *encodings), strict=False)
    ]
    lengths = np.array([0 if ids is None else len(ids) for ids in own], dtype="<i4")
    starts = np.array([e.pool_start for e in encodings], dtype="<i4")
    ends = np.array([0 if e.span is None else e.span.end for e in encodings], dtype="<i4")
    arrays = (lengths, starts, ends, *(ids for ids in own if ids is not None))
    payload = b"".join([array.tobytes() for array in arrays])
    return frame(Kind.BATCH, payload, batch_id=batch_id, rows=len(encodings))


def read_batch(rows: int, payload: bytes) -> list[Encoding]:
    numbers = np.frombuffer(payload, dtype="<i4")
    lengths, starts, ends, ids = np.split(numbers, [rows, 2 * rows, 3 * rows])
    encodings: list[Encoding] = []
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    for own, start, end in zip(parts, starts.tolist(), ends.tolist(), strict=True):
        shared = own if len(own) else encodings[-1].ids
        encodings.append(Encoding(shared, start, span=Span(end) if end else None))
    return encodings


def rows_frame(batch_id: int, rows: NDArray[np.float32], faults: Mapping[int, Fault]) -> bytes:
    payload = np.ascontiguousarray(rows, dtype="<f4").tobytes()
    payload += np.array(list(faults.items()), dtype="<i4").tobytes()
    return frame(Kind.ROWS, payload, batch_id=batch_id, rows=len(rows), faults=len(faults))


def read_rows(
    rows: int, faults: int, payload: bytes
) -> tuple[NDArray[np.float32], dict[int, Fault]]:
    """-> (float32 [N, D], row -> what is wrong with it)."""
    values = np.frombuffer(payload, dtype="<f4", count=len(payload) // 4 - 2 * faults)
    pairs = np.frombuffer(payload, dtype="<i4", offset=values.nbytes).reshape(-1, 2)
    return values.reshape(rows, -1), {row: Fault(fault) for row, fault in pairs.tolist()}


def rows_size(rows: int, width: int, faults: int) -> int:
    """Bytes of the payload of ROWS."""
    return 4 * rows * width + 8 * faults


def start_frame(options: RunnerOptions, runner: str | None, log_format: str, level: str) -> bytes:
    """runner: `module:factory` in place of the real one."""
    start = {
        "options": dataclasses.asdict(options),
        "runner": runner,
        "log_format": log_format,
        "log_level": level,
    }
    return frame(Kind.START, orjson.dumps(start))


def hello_frame(info: RunnerInfo, tokens_per_s: float) -> bytes:
    hello = {"info": dataclasses.asdict(info), "tokens_per_s": tokens_per_s}
    return frame(Kind.HELLO, orjson.dumps(hello))


def refused_frame(message: str, *, final: bool, temporary: bool) -> bytes:
    """final: no new try would help. temporary: what is missing may be there again later."""
    why = {"message": message, "final": final, "temporary": temporary}
    return frame(Kind.REFUSED, orjson.dumps(why))
