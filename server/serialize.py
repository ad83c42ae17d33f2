"""Vectors to response bytes: dimensions, float or base64. Written once, without pydantic."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray


def cut(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first `dimensions` values, of length 1 again."""
    if dimensions is None or dimensions == len(vector):
        return vector
    head = vector[:dimensions]
    norm = float(np.linalg.norm(head))
    return (head / norm).astype(np.float32) if norm else head


def embeddings_body(
    vectors: Sequence[NDArray[np.float32]],
    *,
    model: str,
    tokens: int,
    base64: bool,
    dimensions: int | None = None,
) -> bytes:
    """The body of an answer of /v1/embeddings. base64: little-endian float32, padded."""
    data: list[dict[str, Any]] = []
    for index, vector in enumerate(vectors):
        row = np.ascontiguousarray(cut(vector, dimensions), dtype="<f4")
        shown = b64encode(row.tobytes()).decode("ascii") if base64 else row
        data.append({"object": "embedding", "index": index, "embedding": shown})
    return orjson.dumps(
        {
            "object": "list",
            "data": data,
            "model": model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )
