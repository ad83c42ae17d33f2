"""The table of clients in docs/clients.md, made of the last results.

python -m tests.clients.page        # rewrites the page between its marks
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.clients.environments import HERE, ROOT

PAGE = ROOT / "docs" / "clients.md"
RESULTS = HERE / "results.json"
BEGIN, END = "<!-- table: python -m tests.clients.page -->", "<!-- end of table -->"
SIDES = {
    "Q": "by itself",
    "q": "`-query`",
    "u": "`/query` in the URL",
    "-": "no way",
}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| client | version | passages | a query's vector | our words in its errors |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [line(row) for row in result["clients"]]
    if result["suites"]:
        lines += ["", "| suite | version | passed |", "| --- | --- | --- |"]
        for suite in result["suites"]:
            waits = f" (not yet: {suite['not_yet']})" if suite["not_yet"] else ""
            passed = f"{suite['passed']} of {suite['tests']}{waits}"
            lines.append(f"| {suite['suite']} | {suite['version']} | {passed} |")
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    if row["not_yet"]:
        cells = [f"not yet: {row['not_yet']}", "", ""]
    elif row["refused"]:
        cells = [f"no: {row['note']}", "", ""]
    else:
        side = SIDES[row["side"]] + (", **else silently a passage's**" if row["silent"] else "")
        told = "all" if len(row["told"]) == 3 else ", ".join(row["told"]) or "none"
        if row["ranks"]:
            side = ""
        right = "right" if row["passages"] else "**fails**"
        cells = [right + (f" ({row['note']})" if row["note"] else ""), side, told]
    return " | ".join(["| " + row["client"], row["version"], *cells]) + " |"


def written(page: str, made: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}"


def main(results: Path = RESULTS) -> None:
    PAGE.write_text(written(PAGE.read_text(), table(json.loads(results.read_text()))))


if __name__ == "__main__":
    main()
