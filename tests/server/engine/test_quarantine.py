"""Who is blamed for a dead worker, and for how long."""

from __future__ import annotations

import numpy as np

from model.batch import Encoding
from server.engine.quarantine import REMEMBERED_MOST, REMEMBERED_S, Quarantine
from server.engine.request_queue import Entry, QueuedRequest


def entries(*numbers: int) -> list[Entry[None]]:
    encodings = [Encoding(np.array([1, number, 2], dtype=np.int32)) for number in numbers]
    return list(QueuedRequest.of(encodings, None).waiting)


def convict(quarantine: Quarantine, number: int, now: float) -> Encoding:
    (entry,) = entries(number)
    assert quarantine.blame([entry], now) is None
    assert quarantine.blame([entry], now) is entry
    return entry.encoding


def test_two_deaths_in_company_make_suspects_not_culprits() -> None:
    quarantine, batch = Quarantine(), entries(5, 6)
    assert quarantine.blame(batch, now=0) is None
    assert not any(entry.alone for entry in batch)
    assert quarantine.blame(batch, now=0) is None
    assert all(entry.alone for entry in batch)
    assert quarantine.blame(batch[:1], now=0) is None
    assert quarantine.blame(batch[:1], now=0) is batch[0]


def test_a_culprit_is_remembered_for_a_while() -> None:
    quarantine = Quarantine()
    culprit = convict(quarantine, 5, now=100)
    same = Encoding(culprit.ids.copy())
    other_pool = Encoding(culprit.ids.copy(), pool_start=1)
    assert quarantine.first_culprit([other_pool, same], now=100 + REMEMBERED_S - 1) == 1
    assert quarantine.first_culprit([same], now=100 + REMEMBERED_S) is None


def test_only_so_many_are_remembered() -> None:
    quarantine = Quarantine()
    culprits = [convict(quarantine, n, now=0) for n in range(REMEMBERED_MOST + 1)]
    assert quarantine.first_culprit(culprits[:1], now=1) is None
    assert quarantine.first_culprit(culprits[1:2], now=1) == 0
    assert quarantine.first_culprit(culprits[-1:], now=1) == 0
