"""The scores of `nv-embed evaluate` as a page: bars with their intervals, and all as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model.html_report import Bar, Chart, Table, page
from model.training.bootstrap import LEVEL, Judged
from model.user_files import mode_like, replacing


def write_report(
    path: Path,
    judged: Sequence[Judged],
    result: Mapping[str, Any],
    digests: Mapping[str, str],
    against: Path | None,
) -> None:
    """judged: the scores. digests: of each set's files. against: what they are compared with."""
    model = str(result["model"])
    facts = {"model": model, "version of this program": version("nv-embed-server")}
    if against:
        facts["compared with"] = str(against)
    parts: list[Chart | Table] = []
    share = f"{LEVEL:.0%}"
    for metric in dict.fromkeys(row.metric for row in judged):
        rows = [row for row in judged if row.metric == metric]
        parts.append(Chart(metric, [_bar(row) for row in rows], f"Lines: {share} intervals."))
        compared = [bar for row in rows if (bar := _difference(row))]
        if compared:
            words = f"To the other run, of the same items. Lines: {share} intervals."
            parts.append(Chart(f"{metric}: differences", compared, words))
    heads = ["set", "measure", "score", "from", "to", "difference", "from", "to"]
    cells = [
        [
            *(row.name, row.metric, row.score, *(row.interval or (None, None))),
            *(row.difference, *(row.difference_interval or (None, None))),
        ]
        for row in judged
    ]
    parts.append(Table("Scores", heads, cells))
    files = [[name, digest] for name, digest in digests.items()]
    if files:
        parts.append(Table("Sets", ["set", "SHA-256 of its files"], files))
    with replacing(path, mode_like(None)) as file:
        file.write(page(f"Evaluation of {model}", facts, parts, result))


def _bar(row: Judged) -> Bar:
    low, high = row.interval or (None, None)
    return Bar(row.name, row.score, low, high)


def _difference(row: Judged) -> Bar | None:
    if row.difference is None or row.difference_interval is None:
        return None
    return Bar(row.name, row.difference, *row.difference_interval, colour=1)
