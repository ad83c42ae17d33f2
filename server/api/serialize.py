"""Vectors and ids to response bytes. Written once, without pydantic.

Large answers are made in pieces; when each is made and sent is for `routes` to say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import orjson
from numpy.typing import NDArray

from model.batch import Encoding, Span
from model.prompts import Prompt, written
from server.api.chunks import said_of
from server.api.vector_format import VectorFormat

PIECE_VALUES = 8 * 1024
"""Of a piece: an eighth of a millisecond of printing. Base64 takes less, and has more of them."""
_BASE64_VALUES = 32 * 1024


def embeddings_body(
    vectors: Sequence[NDArray[np.float32]],
    *,
    model: str,
    tokens: int,
    how: VectorFormat,
    spans: Sequence[Span] = (),
) -> bytes:
    """The body of an answer of /v1/embeddings."""
    return b"".join(embeddings_pieces(vectors, model=model, tokens=tokens, how=how, spans=spans))


def embeddings_pieces(
    vectors: Sequence[NDArray[np.float32]],
    *,
    model: str,
    tokens: int,
    how: VectorFormat,
    spans: Sequence[Span] = (),
) -> Iterator[bytes]:
    """The same in pieces. A vector is let go when it is written: many at once, with those of other
    requests in the same batch, would take long to free.

    spans: what each vector is of, where there are chunks."""
    step = max(1, (_BASE64_VALUES if how.base64 else PIECE_VALUES) // len(vectors[0]))
    left, index = deque(vectors), 0
    del vectors
    parts = [b'{"object":"list","data":[']
    while left:
        for _ in range(min(step, len(left))):
            comma = b"," if index else b""
            parts.append(b'%b{"object":"embedding","index":%d,"embedding":' % (comma, index))
            parts += how.written(left.popleft())
            parts.append(b',"chunk":%b}' % orjson.dumps(said_of(spans[index])) if spans else b"}")
            index += 1
        if left:
            yield b"".join(parts)
            parts = []
    tail = orjson.dumps(model), tokens, tokens
    parts.append(b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % tail)
    yield b"".join(parts)


def rows_pieces(vectors: Sequence[NDArray[np.float32]], how: VectorFormat) -> Iterator[bytes]:
    """A bare JSON list of vectors, in pieces."""
    step = max(1, PIECE_VALUES // len(vectors[0]))
    for first in range(0, len(vectors), step):
        rows = b",".join(b"".join(how.written(row)) for row in vectors[first : first + step])
        yield b"%b%b" % (b"," if first else b"[", rows)
    yield b"]"


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
            "index": encoding.input(index),
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
