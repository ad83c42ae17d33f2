"""How Python's interpreter is set for a process whose event loop answers requests."""

from __future__ import annotations

import gc
import sys

_SWITCH_S = 0.0005
"""How long a thread may keep the interpreter when the event loop wants it; Python's own 5 ms are as
long as many answers take (D106)."""
_YOUNG = 20_000
"""New containers after which the collector looks for cycles. Python's own 700 are what a dozen
requests in flight hold: it looked all the time, and found nothing (D108)."""


def prepare() -> None:
    """Call it when all is made that stays, and before the first request."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()  # what has been made by now stays: no collection need look at it again
    gc.set_threshold(_YOUNG, 20, 20)
