"""How far a long piece of work has come: a bar on a terminal, a line a minute in a log.

Both tell the rate and the time that is left. Knows nothing of the work.
"""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger("nv_embed.progress")

_SAY_EVERY_S = 60.0


class Progress:
    """Of so many rows, texts, steps. What was done before has no speed."""

    def __init__(
        self,
        total: int | None,
        what: str = "Embedding",
        unit: str = "rows",
        *,
        done: int = 0,
        shown: bool | None = None,
    ) -> None:
        """total: None where nobody knows. done: how many of them an earlier run did. shown: None is
        a bar on a terminal and lines in a log elsewhere, True always the bar, False neither."""
        by_itself = None if sys.stderr else True  # None: where there is a terminal
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=f" {unit}",
            disable=by_itself if shown is None else not shown,
            smoothing=0,  # rows are not alike: the mean of the run tells more than its last second
            mininterval=0.5,
            nrows=24,  # a terminal that does not know its size would get no bar
        )
        self._is_said = shown is None and self._bar.disable
        self._total, self._what, self._unit = total, what, unit
        self._reached = self._skipped = done
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def expect(self, total: int | None) -> None:
        """There are so many, as is known by now."""
        self._total = self._bar.total = total

    def skip_to(self, place: int) -> None:
        """Up to there all was done before."""
        ahead = place - self._reached
        if ahead > 0:
            self._skipped += ahead
            if not self._bar.disable:
                self._bar.initial += ahead
            self.reach(place)

    def advance(self, count: int = 1, figures: str = "") -> None:
        self.reach(self._reached + count, figures)

    def reach(self, place: int, figures: str = "") -> None:
        """figures: what else is worth a look, such as a loss."""
        ahead = place - self._reached
        if ahead <= 0:
            return
        self._reached = place
        if figures and not self._bar.disable:
            self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(ahead)
        now = time.monotonic()
        if self._is_said and now - self._said >= _SAY_EVERY_S:
            self._said = now
            self._say(now - self._started, figures)

    def _say(self, seconds: float, figures: str) -> None:
        done = self._reached - self._skipped
        rate = done / seconds
        left = of = ""
        if self._total is not None:
            of = f" of {self._total}"
            ahead = max(self._total - self._reached, 0)
            left = f", about {_duration(ahead / rate)} left" if done else ""
        logger.info(
            "%s: %d%s %s, %.1f %s/s%s%s",
            self._what,
            self._reached,
            of,
            self._unit,
            rate,
            self._unit,
            left,
            f"; {figures}" if figures else "",
        )


def _duration(seconds: float) -> str:
    """As one would say it: 90 s, 12 min, 3 h 5 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
