"""How an input is cut into shards. Knows neither what rows hold nor where shards are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from server.offline.job import Row, Rows
from server.offline.parts import Shard

_SHARD_BYTES = 64 << 20
_ROW_BYTES = 8192
"""A shard holds no more text than this times its size (or 64 MiB): long rows make short shards."""


def shards_of(rows: Rows[Row], size: int) -> Iterator[tuple[Shard, list[Row]]]:
    """Cut the input into shards; the same input and size give the same shards."""
    most = max(_SHARD_BYTES, size * _ROW_BYTES)
    chunk: list[Row] = []
    digest, weight, number, first = hashlib.sha256(), 0, 0, 0
    for row in rows.read():
        if chunk and (len(chunk) == size or weight + rows.weight(row) > most):
            yield Shard(number, first, len(chunk), digest.hexdigest()), chunk
            number, first = number + 1, first + len(chunk)
            chunk, digest, weight = [], hashlib.sha256(), 0
        key = rows.key(row)
        digest.update(len(key).to_bytes(8, "little") + key)
        weight += rows.weight(row)
        chunk.append(row)
    if chunk:
        yield Shard(number, first, len(chunk), digest.hexdigest()), chunk
