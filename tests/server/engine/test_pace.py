"""How fast workers are, and how long their answers may take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.pace import Pace

SECONDS = st.floats(1e-4, 1e4)
TOKENS = st.integers(1, 100_000)


def test_before_anything_is_known_the_option_alone_counts() -> None:
    pace = Pace(hang_timeout=2)
    assert pace.rate("cpu") is None
    assert pace.patience("cpu", 1_000_000) == 2


def test_what_warming_up_has_shown_counts_until_a_batch_is_measured() -> None:
    pace = Pace(hang_timeout=60)
    pace.tell("cpu", 13.0)  # 8 tokens in 0.6 s: a large model on a processor
    assert pace.patience("cpu", 4096) == pytest.approx(10 * 4096 / 13)
    pace.measure("cpu", 1024, 32.0)
    assert pace.rate("cpu") == 32.0
    pace.tell("cpu", 13.0)  # its successor's
    assert pace.rate("cpu") == 32.0
    pace.measure("cpu", 1024, 16.0)
    assert pace.rate("cpu") == pytest.approx(0.8 * 32 + 0.2 * 64)


def test_each_kind_of_device_has_its_own_rate() -> None:
    pace = Pace(hang_timeout=60)
    pace.measure("cuda H100", 8192, 0.1)
    assert pace.patience("cpu x86_64", 1024) == 60
    pace.measure("cpu x86_64", 1024, 30.0)
    assert pace.patience("cpu x86_64", 1024) == pytest.approx(300)
    assert pace.patience("cuda H100", 8192) == 60


@given(option=SECONDS, batches=st.lists(st.tuples(TOKENS, SECONDS), max_size=20), tokens=TOKENS)
def test_patience_is_never_less_than_the_option_nor_than_the_slowest_rate_tells(
    option: float, batches: list[tuple[int, float]], tokens: int
) -> None:
    pace = Pace(option)
    for batch in batches:
        pace.measure("cpu", *batch)
    patience = pace.patience("cpu", tokens)
    assert patience >= option
    if batches:
        slowest = min(done / seconds for done, seconds in batches)
        assert patience <= max(option, 10 * tokens / slowest) * (1 + 1e-9)
