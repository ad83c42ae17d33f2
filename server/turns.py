"""Work on a thread beside the event loop, a step for each turn of the loop.

A thread that never rests takes the interpreter's lock whenever the loop lets go of it, which is at
each call of the system: the loop would wait a dozen times in each of its turns (D106).
"""

from __future__ import annotations

import asyncio
import threading

_MOST_S = 1.0


class Turns:
    """Of one thread; made on the event loop."""

    def __init__(self) -> None:
        self._loop, self._turn = asyncio.get_running_loop(), threading.Semaphore(0)

    def wait(self) -> None:
        """On the thread: until the loop has come round. A second at most, for it may have stopped.

        Raises RuntimeError when it is closed.
        """
        self._loop.call_soon_threadsafe(self._turn.release)
        self._turn.acquire(timeout=_MOST_S)
