"""How late the event loop comes: what everybody waits who asks for anything."""

from __future__ import annotations

import asyncio

from server.engine.tallies import Tally

_EVERY_S = 0.25


class LoopLag:
    """Looks now and then how much later than asked it is called."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From within the loop."""
        self._again(asyncio.get_running_loop())

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + _EVERY_S
        self._timer = loop.call_at(due, self._look, loop, due)

    def _look(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self._tally.observe(max(0.0, loop.time() - due))
        self._again(loop)
