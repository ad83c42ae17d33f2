"""Vectors and ids to response bytes: dimensions, float or base64. Written once, without pydantic.

Large answers are made in pieces; when each is made and sent is for `routes` to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from model.batch import Encoding
from model.prompts import Prompt, written
from server.errors import InvalidRequestError

PIECE_VALUES = 32 * 1024


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
    return b"".join(
        embeddings_pieces(vectors, model=model, tokens=tokens, base64=base64, dimensions=dimensions)
    )


def embeddings_pieces(
    vectors: Sequence[NDArray[np.float32]],
    *,
    model: str,
    tokens: int,
    base64: bool,
    dimensions: int | None = None,
) -> Iterator[bytes]:
    """The same in pieces, each of about PIECE_VALUES values: a millisecond or two of work."""
    yield b'{"object":"list","data":['
    step = max(1, PIECE_VALUES // len(vectors[0]))
    for first in range(0, len(vectors), step):
        # base64 needs no escaping, so an encoder that looks at each of its characters is spared.
        rows = (
            np.ascontiguousarray(cut(vector, dimensions), dtype="<f4")
            for vector in vectors[first : first + step]
        )
        data = b",".join(
            b'{"object":"embedding","index":%d,"embedding":%b}'
            % (index, _base64(row) if base64 else _floats(row))
            for index, row in enumerate(rows, first)
        )
        yield b"," + data if first else data
    yield b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        orjson.dumps(model),
        tokens,
        tokens,
    )


def tokens_pieces(
    encodings: Sequence[Encoding], prompt: Prompt, max_tokens: int
) -> Iterator[bytes]:
    """The body of an answer of /tokenize, in pieces."""
    yield b'{"object":"list","prefix":%b,"suffix":%b,"data":[' % (
        orjson.dumps(written(prompt.examples + prompt.prefix)),
        orjson.dumps(written(prompt.suffix)),
    )
    items: list[bytes] = []
    values = 0
    for index, encoding in enumerate(encodings):
        item = {
            "index": index,
            "ids": encoding.ids,
            "count": len(encoding),
            "instruction_tokens": encoding.pool_start,
        }
        items.append(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY))
        values += len(encoding)
        if values >= PIECE_VALUES and index + 1 < len(encodings):
            yield b",".join([*items, b""])
            items, values = [], 0
    yield b",".join(items)
    yield b'],"max_input_tokens":%d}' % max_tokens


def _base64(row: NDArray[np.float32]) -> bytes:
    return b'"%b"' % pybase64.b64encode(row.data)


def _floats(row: NDArray[np.float32]) -> bytes:
    return orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
