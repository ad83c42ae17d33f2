"""The parts of inputs that were too long, put together again. Pure.

An input's vector is the mean of its parts' vectors, each by how many ids of the text it holds, of
length one again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding

Rows = Sequence[NDArray[np.float32]]


def averaged(encodings: Sequence[Encoding], rows: Rows) -> Rows:
    """rows: float32 [D] for each encoding -> for each input."""
    if all(encoding.part is None for encoding in encodings):
        return rows
    of_inputs: dict[int, list[tuple[int, NDArray[np.float32]]]] = {}
    for encoding, row in zip(encodings, rows, strict=True):
        assert encoding.part is not None, "a request has parts of all its inputs, or of none"
        of_inputs.setdefault(encoding.part.input, []).append((encoding.part.weight, row))
    return [_mean(parts) for parts in of_inputs.values()]


def _mean(parts: Sequence[tuple[int, NDArray[np.float32]]]) -> NDArray[np.float32]:
    if len(parts) == 1:
        return parts[0][1]
    total: NDArray[np.float64] = sum(
        (row.astype(np.float64) * weight for weight, row in parts[1:]),
        start=parts[0][1].astype(np.float64) * parts[0][0],
    )
    norm = float(np.linalg.norm(total))
    return (total / norm if norm else total).astype(np.float32)
