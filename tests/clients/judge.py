"""What a client showed, from what it gave: pure functions over the harness's notes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.clients.client import MISTAKES, Client

SAME = 0.99999  # cosine


@dataclass(frozen=True, slots=True)
class Expected:
    """The right vectors: [texts, D], and the question's two."""

    passages: np.ndarray
    query: np.ndarray
    as_passage: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Shown:
    """As in a row of the table; why: what the client said where passages are not right."""

    passages: bool
    side: str = "-"
    silent: bool = False
    told: tuple[str, ...] = ()
    why: str = ""


def same(found: object, expected: np.ndarray) -> bool:
    """Whether each row is the expected one; a wrong number of them or of dimensions is not."""
    try:
        vectors = np.array(found, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    if vectors.shape != expected.shape or not np.isfinite(vectors).all():
        return False
    lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(expected, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (vectors * expected).sum(axis=-1) / lengths
    return bool(np.all(cosines > SAME))


def judge(found: dict[str, Any], expected: Expected, *, ranks: bool = False) -> Shown:
    """found: name of what was tried -> {"value"} or {"error"}."""
    passages = found["passages"]
    value = passages.get("value")
    if ranks:
        right = np.shape(value) == expected.scores.shape and np.allclose(
            value, expected.scores, atol=1e-4
        )
    else:
        right = same(value, expected.passages)
    if not right:
        return Shown(False, why=passages.get("error") or "other vectors than the server's")

    told = tuple(name for name, ours in MISTAKES.items() if ours in found[name].get("error", ""))
    if ranks:
        return Shown(True, told=told)

    def is_query(way: str) -> bool:
        return same(found[way].get("value"), expected.query)

    ways = {"Q": "query", "q": "by_suffix", "u": "by_url"}
    return Shown(
        True,
        next((sign for sign, way in ways.items() if is_query(way)), "-"),
        same(found["query"].get("value"), expected.as_passage),
        told,
    )


def faults(client: Client, shown: Shown) -> list[str]:
    """In which ways this is not what its row says; empty where all is."""
    if client.not_yet:
        if shown.passages:
            return [f"it works now, and its row still waits for {client.not_yet}: {shown}"]
        return []
    if client.refused:
        right = not shown.passages and client.refused in shown.why
        return [] if right else [f"it was to be told {client.refused!r}: {shown}"]
    if not shown.passages:
        return [f"passages: {shown.why}"]
    return [
        f"{name} is {getattr(shown, name)!r}, its row says {getattr(client, name)!r}"
        for name in ("side", "silent", "told")
        if getattr(shown, name) != getattr(client, name)
    ]
