"""Which input kills workers: suspects run alone, culprits are refused for a while.

Pure: a time is an argument. Knows neither workers nor futures.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from model.batch import Encoding
from server.engine.request_queue import Entry

SUSPECT_AFTER = 2
"""Deaths over a batch after which its inputs run one to a batch."""
CULPRIT_AFTER = 2
"""Deaths with nothing else in the batch after which an input is the cause."""
REMEMBERED_S = 600.0
REMEMBERED_MOST = 1024


class Quarantine:
    """Counts deaths on the entries, and remembers culprits by their hash."""

    def __init__(self) -> None:
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def blame(self, entries: Sequence[Entry[Any]], now: float) -> Entry[Any] | None:
        """A worker died over this batch. Returns the culprit, if that is proven now; equal inputs
        count as one, and share the blame."""
        for entry in entries:
            entry.deaths += 1
            entry.alone = entry.alone or entry.deaths >= SUSPECT_AFTER
        if len({entry.key for entry in entries}) > 1:
            return None
        deaths_alone = 1 + max(entry.deaths_alone for entry in entries)
        for entry in entries:
            entry.deaths_alone = deaths_alone
        if deaths_alone < CULPRIT_AFTER:
            return None
        entry = entries[0]
        self._until[_hash(entry.encoding)] = now + REMEMBERED_S
        while len(self._until) > REMEMBERED_MOST:
            self._until.popitem(last=False)
        return entry

    def first_culprit(self, encodings: Sequence[Encoding], now: float) -> int | None:
        """Index of the first input that is remembered as a culprit."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        if not self._until:  # nearly always: then nothing is hashed
            return None
        return next((i for i, e in enumerate(encodings) if _hash(e) in self._until), None)


def _hash(encoding: Encoding) -> bytes:
    return hashlib.blake2b(encoding.key, digest_size=16).digest()
