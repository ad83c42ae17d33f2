"""What a log is told of a long piece of work, and what a terminal; on a clock of the test's own."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from model import progress
from model.progress import Progress


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def log() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nv_embed.progress")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield said
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_log_gets_a_line_a_minute(clock: Clock, log: list[str]) -> None:
    with Progress(1000, "Training", "steps", done=100) as bar:
        for second in range(1, 301):
            clock.now = 1000.0 + second
            bar.advance(figures=f"loss {1 / second:.2f}")
    assert log == [
        "Training: 160 of 1000 steps, 1.0 steps/s, about 14 min left; loss 0.02",
        "Training: 220 of 1000 steps, 1.0 steps/s, about 13 min left; loss 0.01",
        "Training: 280 of 1000 steps, 1.0 steps/s, about 12 min left; loss 0.01",
        "Training: 340 of 1000 steps, 1.0 steps/s, about 11 min left; loss 0.00",
        "Training: 400 of 1000 steps, 1.0 steps/s, about 10 min left; loss 0.00",
    ]


def test_what_was_done_before_has_no_speed(clock: Clock, log: list[str]) -> None:
    with Progress(100) as bar:
        clock.now += 60
        bar.skip_to(40)
        clock.now += 60
        bar.reach(52)
    assert log == [
        "Embedding: 40 of 100 rows, 0.0 rows/s",
        "Embedding: 52 of 100 rows, 0.1 rows/s, about 8 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (119.4, "119 s"), (120, "2 min"), (7170, "2 h 0 min"), (11_100, "3 h 5 min")],
)
def test_durations(seconds: float, said: str) -> None:
    assert progress._duration(seconds) == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left(
    clock: Clock, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(10, "Training", "steps") as bar:
        bar.advance(4, "loss 0.5000")
        clock.now += 3600
        bar.advance(6, "loss 0.2500")
    shown = terminal.getvalue().split("\r")[-1]
    assert "Training: 100%" in shown
    assert "10/10" in shown
    assert "steps/s" in shown
    assert "loss 0.2500" in shown
    assert not log, "one of both"


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_where_it_is_not_wanted_nothing_is_said(
    clock: Clock, log: list[str], monkeypatch: pytest.MonkeyPatch, kind: type[io.StringIO]
) -> None:
    monkeypatch.setattr("sys.stderr", stream := kind())
    with Progress(10, shown=False) as bar:
        clock.now += 3600
        bar.advance(5)
    assert not log
    assert not stream.getvalue()
