"""What a model card (README.md beside the weights) tells: its licence, and its example.

Torch-free. Reads the card's Python, never executes it.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PUBLISHED_SCORES = {
    "nv-embed-v1": [[77.9402, 0.4249], [3.7577, 79.6011]],
    "nv-embed-v2": [[87.4269, 0.4628], [0.9653, 86.0372]],
}
"""What the model cards print for their example; used when a card leaves the numbers out."""


def card_license(folder: Path) -> str | None:
    """The `license` of the card's front matter (README.md), if there is one."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except OSError:
        return None
    matter = re.match(r"\A---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        found = yaml.safe_load(matter[1]) if matter else None
    except yaml.YAMLError:
        return None
    license_ = found.get("license") if isinstance(found, dict) else None
    return license_ if isinstance(license_, str) else None


@dataclass(frozen=True, slots=True)
class CardExample:
    """The example of a model card: four texts, and what its code prints for them."""

    prefix: str
    queries: list[str]
    passages: list[str]
    scores: list[list[float]] | None  # queries × passages, times 100


def read_card(card: str) -> CardExample | None:
    """Read the example out of a card's fenced Python, without running it: the assignments of
    plain texts, and the scores in the comment after the last `print`."""
    for block in re.findall(r"```python\s*\n(.*?)```", card, re.DOTALL):
        try:
            tree = ast.parse(block)
        except SyntaxError:
            continue
        values: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                try:
                    values[node.targets[0].id] = _plain_value(node.value, values)
                except (ValueError, KeyError, TypeError):
                    continue  # a call or an import: not a plain value
        prefix = values.get("query_prefix")
        queries, passages = _texts(values.get("queries")), _texts(values.get("passages"))
        if isinstance(prefix, str) and queries and passages:
            found = re.findall(r"^\s*#\s*(\[\[[-+\d.eE,\s\[\]]*\]\])", block, re.MULTILINE)
            scores = ast.literal_eval(found[-1]) if found else None
            return CardExample(prefix, queries, passages, scores)
    return None


def _plain_value(node: ast.expr, values: dict[str, Any]) -> Any:
    """The value of a literal, a name met before, a sum or a subscript of these."""
    match node:
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _plain_value(left, values) + _plain_value(right, values)
        case ast.Subscript(value=value, slice=index):
            return _plain_value(value, values)[_plain_value(index, values)]
        case ast.List(elts=elements):
            return [_plain_value(element, values) for element in elements]
    return ast.literal_eval(node)


def _texts(value: object) -> list[str] | None:
    """`value`, if it is a list of texts."""
    texts = [x for x in value if isinstance(x, str)] if isinstance(value, list) else []
    return texts if texts == value else None
