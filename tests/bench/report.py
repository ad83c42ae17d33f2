"""How a benchmark reports: what and why, the hardware, a table, files, one line of JSON.

Knows no workload. Absolute figures belong to the machine that gave them; the ratios of one run
are what is worth comparing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from model.html_report import Bar, Chart, Table, page
from model.platform import resources

RESULTS = Path(__file__).parent / "results"
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def hardware() -> dict[str, Any]:
    """The processor as it names itself, what it can multiply with, cores, memory, load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    total = Path("/proc/meminfo").read_text().split(maxsplit=2)[1]
    return {
        "processor": fields.get("model name", platform.processor()),
        "instructions": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": resources.usable_cores(),
        "memory_gb": round(int(total) * 1024 / 1e9, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


@dataclass
class Report:
    """One run of one benchmark."""

    name: str
    what: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=hardware)

    def start(self) -> None:
        print(f"# {self.name}\n{self.what}\n")
        print("hardware:", json.dumps(self.machine))
        print("settings:", json.dumps(self.settings), flush=True)

    def add(self, **row: Any) -> None:
        """A row of the table; figures to four digits, for more would pretend a precision."""
        self.rows.append(
            {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        )

    def finish(
        self,
        results: Path,
        *,
        group: str,
        label: str,
        value: str,
        unit: str,
        lines: Mapping[str, str] | None = None,
    ) -> None:
        """Print the table, write NAME.json, .html, .png and .svg, end with a line of JSON.

        group, label, value: the columns that the plot's groups, bars and heights come from.
        lines: columns and their units; then the plot has lines over a group that is a number, a
        panel for each column.
        """
        print("\n" + table(self.rows))
        for name, ratio in self.ratios.items():
            print(f"{name}: {ratio:.3f}")
        results.mkdir(parents=True, exist_ok=True)
        summary = {
            "benchmark": self.name,
            "hardware": self.machine,
            "settings": self.settings,
            "ratios": {name: round(ratio, 4) for name, ratio in self.ratios.items()},
            "rows": self.rows,
        }
        whole = {**summary, "what": self.what, "raw": self.raw}
        (results / f"{self.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
        path = results / self.name
        if lines:
            _plot_lines(self.rows, path, over=group, label=label, columns=lines)
        else:
            _plot(self.rows, path, group=group, label=label, value=value, unit=unit)
        (results / f"{self.name}.html").write_text(self._page(summary, group, label, value, unit))
        print(json.dumps(summary), flush=True)

    def _page(
        self, summary: Mapping[str, Any], group: str, label: str, value: str, unit: str
    ) -> str:
        """One file to send and to open: the plot, the ratios, the table, what it ran on."""
        rows = [row for row in self.rows if row.get(value) is not None]
        labels = list(dict.fromkeys(str(row[label]) for row in rows))
        bars = [
            Bar(f"{row[group]}, {row[label]}", row[value], colour=labels.index(str(row[label])))
            for row in rows
        ]
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        parts: list[Chart | Table] = [Chart(unit, bars)]
        if self.ratios:
            parts.append(Table("Ratios", ["what", "ratio"], list(self.ratios.items())))
        cells = [[row.get(name) for name in names] for row in self.rows]
        parts.append(Table("Measured", names, cells))
        facts = {"why": self.what, **self.machine, **self.settings}
        return page(f"Benchmark: {self.name}", facts, parts, summary)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table, its columns as wide as their widest cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _plot(
    rows: Sequence[Mapping[str, Any]], path: Path, *, group: str, label: str, value: str, unit: str
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get(value) is not None]
    groups = list(dict.fromkeys(str(row[group]) for row in rows))
    labels = list(dict.fromkeys(str(row[label]) for row in rows))
    figure = Figure(figsize=(max(6, 2 * len(groups)) + 3, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for place, name in enumerate(labels):
        heights = {str(r[group]): r.get(value) for r in rows if str(r[label]) == name}
        xs = [i + place * width for i, g in enumerate(groups) if heights.get(g) is not None]
        axes.bar(xs, [heights[g] for g in groups if heights.get(g) is not None], width, label=name)
    middle = 0.4 - width / 2
    axes.set_xticks([i + middle for i in range(len(groups))], groups, fontsize=8)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _plot_lines(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    over: str,
    label: str,
    columns: Mapping[str, str],
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(columns) + 1.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(str(row[label]) for row in rows))
    for place, (column, unit) in enumerate(columns.items()):
        axes = figure.add_subplot(1, len(columns), place + 1)
        for name in names:
            points = [
                (row[over], row[column])
                for row in rows
                if str(row[label]) == name and row.get(column) is not None
            ]
            axes.plot(*zip(*points, strict=True), marker="o", label=None if place else name)
        axes.set_xlabel(over)
        axes.set_ylabel(unit)
        values = [row[column] for row in rows if row.get(column)]
        if values and max(values) > _LOG_FROM * min(values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


_LOG_FROM = 100
"""A panel whose largest value is so many times its least has a logarithmic scale."""


def _save(figure: Any, path: Path) -> None:
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=110, metadata=_UNDATED[suffix])


_UNDATED = {".png": {"Software": None}, ".svg": {"Date": None}}


class Seconds(NamedTuple):
    """By the clock, and of this process on its processors: less is lost to other programs there."""

    wall: float
    cpu: float


def alternate(
    alternatives: Mapping[str, Sequence[Callable[[], object]]], rounds: int
) -> dict[str, list[list[Seconds]]]:
    """What each alternative's parts take in each round, one alternative after the other in every
    round: [round][part].

    What else runs on the machine then falls on all of them alike.
    """
    for parts in alternatives.values():
        for run in parts:
            run()  # warm-up
    seconds: dict[str, list[list[Seconds]]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, parts in alternatives.items():
            seconds[name].append([_timed(run) for run in parts])
    return seconds


def _timed(run: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed; nan without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder for the raw results and plots"
    )
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"), help="checkpoints")
    return parser


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that shaped the run, for the report."""
    return {n: v for n, v in vars(options).items() if n not in ("results", "scratch")}
