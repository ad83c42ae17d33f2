"""How far a run has come: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger("nv_embed.encode")

_SAY_EVERY_S = 60.0


class Progress:
    """Of so many rows. Those of an earlier run have no speed."""

    def __init__(self, rows: int) -> None:
        self._bar = tqdm(
            total=rows,
            desc="Embedding",
            unit=" rows",
            disable=None if sys.stderr else True,  # None: where there is no terminal
            smoothing=0,  # rows are not alike: the mean of the run tells more than its last second
            mininterval=0.5,
            nrows=24,  # a terminal that does not know its size would get no bar
        )
        self._rows, self._reached, self._skipped = rows, 0, 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def skip_to(self, row: int) -> None:
        ahead = row - self._reached
        if ahead > 0:
            self._skipped += ahead
            if not self._bar.disable:
                self._bar.initial += ahead
            self.reach(row)

    def reach(self, row: int) -> None:
        ahead = row - self._reached
        if ahead <= 0:
            return
        self._reached = row
        self._bar.update(ahead)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= _SAY_EVERY_S:
            self._said = now
            done, rate = row - self._skipped, (row - self._skipped) / (now - self._started)
            left = f", about {(self._rows - row) / rate:.0f} s left" if done else ""
            logger.info("%d of %d rows, %.1f rows/s%s", row, self._rows, rate, left)
