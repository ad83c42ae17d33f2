"""The answer of a request while its rows are on their way."""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from server.errors import ServerError


class PendingAnswer:
    """Gathers a request's rows, float32 [D] each, then wakes who awaits `future`."""

    __slots__ = ("future", "missing", "rows")

    def __init__(self, num_inputs: int) -> None:
        self.future: asyncio.Future[list[NDArray[np.float32]]] = (
            asyncio.get_running_loop().create_future()
        )
        self.rows: list[NDArray[np.float32] | None] = [None] * num_inputs
        self.missing = num_inputs

    @property
    def done(self) -> bool:
        return self.future.done()

    def lacks(self, index: int) -> bool:
        """Whether this row is still awaited."""
        return not self.done and self.rows[index] is None

    def set_row(self, index: int, row: NDArray[np.float32]) -> None:
        assert self.rows[index] is None, index
        self.rows[index] = row
        self.missing -= 1
        if not self.missing and not self.done:
            self.future.set_result([row for row in self.rows if row is not None])

    def fail(self, error: ServerError) -> None:
        if not self.done:
            self.future.set_exception(error)
