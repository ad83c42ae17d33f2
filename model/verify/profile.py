"""The step of gpu-check that profiles one forward: kernels, operations, and when the GPU idles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from model.verify.bench import Bench

_TOP = 30


def profile(bench: Bench, variant: str, length: int, batch_tokens: int) -> dict[str, Any]:
    """One forward under torch's profiler: the kernels by time, and how long the device idles."""
    runner, encodings = bench.runner(variant), bench.texts(length, batch_tokens)
    runner.embed(encodings)
    with torch.profiler.profile(activities=_activities()) as profiler:
        runner.embed(encodings)
        bench.synchronize()
    kernels, operations, spans = [], [], []
    for event in profiler.events():
        begin, end = event.time_range.start, event.time_range.end
        if event.device_type == DeviceType.CPU:
            operations.append((event.name, event.self_cpu_time_total))
        elif not event.is_user_annotation:
            kernels.append((event.name, end - begin))
            spans.append((begin, end))
    return {
        "kernels": _by_name(kernels),
        "operations": _by_name(operations),
        "device": _gaps(sorted(spans)),
    }


def _by_name(times: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """The names that took longest: how often, and microseconds in all."""
    names: dict[str, list[float]] = {}
    for name, taken in times:
        names.setdefault(name[:200], []).append(taken)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:_TOP]
    return [{"name": name, "count": len(us), "us": sum(us)} for name, us in longest]


def _gaps(spans: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Of kernels in the order of their starts, in microseconds."""
    if not spans:
        return {}
    busy, gaps, until = 0.0, [], spans[0][0]
    for begin, end in spans:
        if begin > until:
            gaps.append(begin - until)
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return {
        "launches": len(spans),
        "span_us": until - spans[0][0],
        "busy_us": busy,
        "idle_us": sum(gaps),
        "gaps": len(gaps),
        "largest_gaps_us": sorted(gaps, reverse=True)[:10],
    }


def _activities() -> Any:
    return torch.profiler.supported_activities()  # type: ignore[no-untyped-call]
