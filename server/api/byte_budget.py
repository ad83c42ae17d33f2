"""How many bytes of request bodies and answers are in the front's hands. Pure.

The queue bounds tokens; this bounds what waits around it: bodies that are still arriving, and
answers that a slow client has not read.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class ByteBudgetError(Exception):
    """The budget is spent."""


class ByteBudget:
    """`with budget.reservation() as reservation: reservation.add(n)`."""

    def __init__(self, limit: int, on_refusal: Callable[[], None] = lambda: None) -> None:
        self.limit, self.on_refusal = limit, on_refusal
        self.used = 0

    def reservation(self) -> Reservation:
        return Reservation(self)


class Reservation:
    """What one request holds; given back when the block ends."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.held = 0

    def add(self, size: int) -> None:
        """Raises ByteBudgetError when others hold too much; a request alone is always let in."""
        budget = self._budget
        if budget.used > self.held and budget.used + size > budget.limit:
            budget.on_refusal()
            raise ByteBudgetError
        budget.used += size
        self.held += size

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._budget.used -= self.held
        self.held = 0
