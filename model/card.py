"""What a model card (README.md beside the weights) tells: its licence, and its example.

Torch-free. Reads the card's Python, never executes it.
"""

from __future__ import annotations

import ast
import codecs
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from model.errors import CheckpointError
from model.files import open_regular

PUBLISHED_SCORES = {
    "nv-embed-v1": [[77.9402, 0.4249], [3.7577, 79.6011]],
    "nv-embed-v2": [[87.4269, 0.4628], [0.9653, 86.0372]],
}
"""What the model cards print for their example; used when a card leaves the numbers out."""


_MOST_BYTES = 1 << 20
"""Of a card, its beginning is read. The longest hold tables of scores, some 300 KB."""
_FRONT_MATTER = re.compile(r"---[^\S\n]*\n(.*?\n)---[^\S\n]*(?:\n|\Z)", re.DOTALL)
_INSTRUCTED = re.compile(r"Instruct: .*\nQuery: ")
_LICENSE = re.compile(r"""^["']?license["']?[ \t]*:.{,200}""", re.MULTILINE)
"""Its line alone: those tables in front of it take the YAML parser a second."""


def read_card_text(folder: Path) -> str | None:
    """The beginning of README.md; None where there is none, or it is not a UTF-8 text file. A
    card is a courtesy: whatever is wrong with it stops nothing."""
    try:
        with open_regular(folder / "README.md") as file:
            raw = file.read(_MOST_BYTES)
    except (CheckpointError, OSError):
        return None
    try:
        # Not final: the beginning of a large file may end within a character.
        return codecs.getincrementaldecoder("utf-8-sig")().decode(raw)
    except UnicodeDecodeError:
        return None


def card_license(folder: Path) -> str | None:
    """The `license` of the card's front matter (README.md), if there is one."""
    matter = _FRONT_MATTER.match(read_card_text(folder) or "")
    line = _LICENSE.search(matter[1]) if matter else None
    try:
        found = yaml.safe_load(line[0]) if line else None
    except (yaml.YAMLError, ValueError, RecursionError):  # as a date that is none, brackets
        return None
    license_ = next(iter(found.values())) if isinstance(found, dict) else None
    return license_ if isinstance(license_, str) and license_ else None


def licence_files(folder: Path) -> list[Path]:
    """Its licence and notice files."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.lower().startswith(("license", "licence", "notice"))
    ]


@dataclass(frozen=True, slots=True)
class CardExample:
    """The example of a model card: four texts, and what its code prints for them."""

    prefix: str
    queries: list[str]
    passages: list[str]
    scores: list[list[float]] | None  # queries × passages, times 100
    passage_prefix: str = ""


def read_card(card: str) -> CardExample | None:
    """Read the example out of a card's fenced Python, without running it: the assignments of
    plain texts, the functions that make a text of theirs, and the scores in the comment after the
    last `print`. Queries with a template are read where it is that of NV-Embed and e5-mistral."""
    functions: dict[str, Any] = {}
    for block in re.findall(r"```python\s*\n(.*?)```", card, re.DOTALL):
        try:
            tree = ast.parse(block)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # all of them are its own
            continue
        values = dict(functions)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = values[node.name] = node
                continue
            found = None
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                # Else it is a call or an import: not a plain value.
                with suppress(ValueError, LookupError, TypeError, RecursionError):
                    found = _plain_value(node.value, values)
            for name in _assigned(node):
                values.pop(name, None)  # what it was before it is no more
            if found is not None:
                values[node.targets[0].id] = found
        queries = _texts(values.get("queries"))
        passages = _texts(values.get("passages", values.get("documents")))
        prefix = values.get("query_prefix")
        if prefix is None and all(map(_INSTRUCTED.match, queries or ())):
            prefix = ""  # in the queries already
        if isinstance(prefix, str) and queries and passages:
            tables = re.findall(r"^\s*#\s*(\[\[[-+\d.eE,\s\[\]]*\]\])", block, re.MULTILINE)
            scores = _scores(tables[-1]) if tables else None
            return CardExample(prefix, queries, passages, scores, _passage_prefix(values))
    return None


def _assigned(node: ast.stmt) -> list[str]:
    """The names that a statement gives values."""
    try:
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    except RecursionError:
        return []
    return [name.id for name in names if isinstance(name.ctx, ast.Store)]


def _passage_prefix(values: dict[str, Any]) -> str:
    prefix = values.get("passage_prefix", values.get("document_prefix", ""))
    return prefix if isinstance(prefix, str) else ""


def _plain_value(node: ast.expr, values: dict[str, Any]) -> Any:
    """The value of a literal, a name met before, a sum, a subscript or a function of these."""
    match node:
        case ast.Name(id=name):
            if isinstance(values[name], ast.FunctionDef):
                raise ValueError("a function is called, and given to nobody")
            return values[name]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            total = _plain_value(left, values) + _plain_value(right, values)
            if isinstance(total, str | list) and len(total) > _MOST_BYTES:
                raise ValueError("a sum that doubles itself")
            return total
        case ast.Subscript(value=value, slice=index):
            return _plain_value(value, values)[_plain_value(index, values)]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return _returned(values[name], [_plain_value(each, values) for each in arguments])
        case ast.JoinedStr(values=parts):
            text = "".join(_plain_value(part, values) for part in parts)
            if len(text) > _MOST_BYTES:
                raise ValueError("a text that doubles itself")
            return text
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _plain_value(value, values)
        case ast.List(elts=elements):
            return [_plain_value(element, values) for element in elements]
    return ast.literal_eval(node)


def _returned(function: Any, arguments: list[Any]) -> Any:
    """What a function of one `return` gives, of its parameters alone."""
    match function:
        case ast.FunctionDef(args=parameters, body=[ast.Return(value=ast.expr() as value)]):
            names = [parameter.arg for parameter in parameters.args]
            return _plain_value(value, dict(zip(names, arguments, strict=True)))
    raise ValueError("no such function")


def _scores(text: str) -> list[list[float]] | None:
    """A table of numbers, if `text` is one."""
    try:
        table = ast.literal_eval(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    rows = [row for row in table if isinstance(row, list) and len(row) == len(table[0])]
    numbers = all(isinstance(number, int | float) for row in rows for number in row)
    return table if numbers and len(rows) == len(table) else None


def _texts(value: object) -> list[str] | None:
    """`value`, if it is a list of texts."""
    texts = [x for x in value if isinstance(x, str)] if isinstance(value, list) else []
    return texts if texts == value else None
