"""What the bodies of other protocols have in common: which fields of this server they refuse.

Knows no protocol.
"""

from __future__ import annotations

import functools
from typing import Any

from server.api.schemas import REFUSED, UNFOLDED, EmbeddingsRequest
from server.api.wire import Wire
from server.errors import InvalidRequestError

_HARMLESS: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("normalize", "normalized", "use_activation", "activation"), (True,)),
    **dict.fromkeys(("late_chunking", "return_multivector"), (False,)),
    **dict.fromkeys(("output_dtype", "embed_dtype", "embedding_type"), ("float", "float32")),
    "add_special_tokens": (True,),
    "encoding_format": ("float",),
    "endianness": ("native", "little"),
}
"""Values that ask for what is done anyway."""


class DialectRequest(Wire):
    """A body of another protocol. The fields of /v1/embeddings that it has no place for would
    change the numbers, or who shares them: each is refused, but for what is harmless."""

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in body:
            if name not in cls._foreign():
                continue
            if name in REFUSED:
                raise InvalidRequestError(f"{name}: {REFUSED[name]}", param=name)
            if body[name] not in _HARMLESS.get(name, ()):
                raise InvalidRequestError(
                    f"{name}: this route has no such field, and drops none without a word; POST "
                    "/v1/embeddings takes it, and /query or /passage before any path says the side",
                    param=name,
                )
        return body

    @classmethod
    @functools.cache
    def _foreign(cls) -> frozenset[str]:
        others = {*REFUSED, *UNFOLDED, *EmbeddingsRequest.all_names()}
        return frozenset(others - cls.all_names() - {"user"})
