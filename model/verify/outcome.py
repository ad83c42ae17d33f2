"""What a check found, and the ways to find it: at most, at least, the same vectors.

Knows no model: numbers in, a Check out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check. `got` and `expected` are plain JSON values."""

    name: str
    status: str  # passed, failed, skipped
    got: Any = None
    expected: Any = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.name:<24} {self.status:<8}"]
        if self.status != "skipped":
            parts.append(f"got {_show(self.got)}, expected {_show(self.expected)}")
            if self.tolerance is not None:
                parts.append(f"(tolerance {self.tolerance:g})")
        return " ".join([*parts, self.note]).rstrip()


def at_most(name: str, got: float, limit: float, note: str) -> Check:
    return Check(name, status_of(got <= limit), finite(got), 0.0, limit, note)


def at_least(name: str, got: float, limit: float, note: str) -> Check:
    return Check(name, status_of(got >= limit), finite(got), 1.0, round(1 - limit, 9), note)


def skipped(name: str, reason: str) -> Check:
    return Check(name, "skipped", note=reason)


def status_of(good: bool) -> str:
    return "passed" if good else "failed"


def finite(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def smallest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The smallest cosine of two sets of unit vectors, row by row."""
    return float((a.astype(np.float64) * b).sum(axis=1).min())


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
