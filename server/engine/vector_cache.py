"""Vectors that were computed already, by the exact input. Pure; least recently used go first.

A server has one model, and the whole vector is kept, whatever `dimensions` a request asks for: so
the ids and the pool's start are the whole key, behind a tenant's salt.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

_OVERHEAD = 300
"""Bytes that an item takes beside its key and its values: objects, and its place in the table."""


class VectorCache:
    """Holds at most `limit` bytes; 0 holds nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        """The vector of the input with this key (`Entry.key`), if it is held."""
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: NDArray[np.float32]) -> None:
        """Keep a copy: `row` is a view of a whole batch."""
        size = _size(key, row)
        if size > self.limit or key in self._rows:
            return
        self._rows[key] = row.copy()
        self.used += size
        while self.used > self.limit:
            self.used -= _size(*self._rows.popitem(last=False))


def _size(key: bytes, row: NDArray[np.float32]) -> int:
    return len(key) + row.nbytes + _OVERHEAD
