"""Tokens that the requests of each name's keys hold, so that none takes the whole queue. Pure."""

from __future__ import annotations


class KeyShares:
    """Of one queue. Requests without a named key count together, under the name ""."""

    def __init__(self, limit: int | None) -> None:
        """limit: tokens of one name; None: as many as it likes."""
        self.limit = limit
        self._held: dict[str, int] = {}

    def has_room(self, name: str, tokens: int) -> bool:
        """A name that holds nothing always has: every legal request is let in by itself."""
        held = self._held.get(name)
        return held is None or self.limit is None or held + tokens <= self.limit

    def take(self, name: str, tokens: int) -> None:
        if self.limit is None:
            return
        self._held[name] = self._held.get(name, 0) + tokens

    def give_back(self, name: str, tokens: int) -> None:
        """What a request took, once it is answered."""
        if self.limit is None:
            return
        left = self._held.pop(name) - tokens
        assert left >= 0, (name, left)
        if left:
            self._held[name] = left
