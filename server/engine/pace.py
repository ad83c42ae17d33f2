"""How fast workers are, and how long their answers may take. Pure: a time is an argument.

Knows kinds of devices, and neither workers nor batches.
"""

from __future__ import annotations

_SMOOTHING = 0.2
_HANG_FACTOR = 10


class Pace:
    """Tokens a second of each kind of device: told by warming up, then measured."""

    def __init__(self, hang_timeout: float) -> None:
        """hang_timeout: seconds that every answer may take."""
        self.hang_timeout = hang_timeout
        self._told: dict[str, float] = {}
        self._measured: dict[str, float] = {}

    def tell(self, kind: str, tokens_per_s: float) -> None:
        """What a worker of this kind found when it warmed up; it counts until one is measured."""
        self._told[kind] = tokens_per_s

    def measure(self, kind: str, tokens: int, seconds: float) -> None:
        """A batch of so many tokens took its worker so long."""
        rate = tokens / max(seconds, 1e-6)
        known = self._measured.setdefault(kind, rate)
        self._measured[kind] += _SMOOTHING * (rate - known)

    def rate(self, kind: str) -> float | None:
        """Tokens a second of one worker, if anything is known."""
        return self._measured.get(kind) or self._told.get(kind)

    def patience(self, kind: str, tokens: int) -> float:
        """Seconds in which a worker with so many tokens in hand must have answered: ten times what
        its rate predicts, and never less than the option."""
        rate = self.rate(kind)
        predicted = tokens / rate if rate else 0.0
        return max(self.hang_timeout, _HANG_FACTOR * predicted)
