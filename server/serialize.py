"""Vectors to response bytes: dimensions, float or base64. Written once, without pydantic."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from server.errors import InvalidRequestError


def cut(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first `dimensions` values, of length 1 again."""
    if dimensions is None or dimensions == len(vector):
        return vector
    head = vector[:dimensions]
    norm = float(np.linalg.norm(head))
    return (head / norm).astype(np.float32) if norm else head


def check_dimensions(dimensions: int | None, width: int, allow_fewer: bool) -> None:
    """Raises InvalidRequestError for dimensions that a model of `width` cannot be cut to."""
    if dimensions is None or dimensions == width or (dimensions < width and allow_fewer):
        return
    hint = (
        ""
        if dimensions > width
        else " (the server was started without --allow-truncated-dimensions)"
    )
    raise InvalidRequestError(
        f"This model has {width} dimensions, {dimensions} cannot be had{hint}", param="dimensions"
    )


def embeddings_body(
    vectors: Sequence[NDArray[np.float32]],
    *,
    model: str,
    tokens: int,
    base64: bool,
    dimensions: int | None = None,
) -> bytes:
    """The body of an answer of /v1/embeddings. base64: little-endian float32, padded."""
    rows = [np.ascontiguousarray(cut(vector, dimensions), dtype="<f4") for vector in vectors]
    # base64 needs no escaping, so an encoder that looks at each of its characters is spared.
    shown = [_base64(row) if base64 else _floats(row) for row in rows]
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value)
        for index, value in enumerate(shown)
    )
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (
        data,
        orjson.dumps(model),
        usage,
    )


def _base64(row: NDArray[np.float32]) -> bytes:
    return b'"%b"' % pybase64.b64encode(row.data)


def _floats(row: NDArray[np.float32]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
