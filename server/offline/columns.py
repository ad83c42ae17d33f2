"""What is carried from a row to its vector: an id, and columns that were chosen.

Owns their types, which every shard has to have alike: those of the first Parquet file, or what the
first lines of JSON show. Knows nothing of models, nor of how a file is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from server.api import json_text
from server.errors import SettingsError
from server.offline.kinds import Kind
from server.offline.parquet_files import parquet_types
from server.offline.places import InputFileError
from server.offline.sources import Source

_HEAD_BYTES = 64 << 10
"""Of the first file of JSON lines: its rows tell the types."""
_OURS = ("index", "embedding")
_INT64 = 1 << 63
_JSON = {"bool": bool, "int64": int, "double": float, "string": str}


@dataclass(frozen=True, slots=True)
class Columns:
    """Names, in the order of the output, and types: Arrow's of Parquet, else a word of JSON's."""

    names: tuple[str, ...] = ()
    id_field: str | None = None
    types: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def described(self) -> dict[str, str]:
        return {name: str(self.types[name]) for name in self.names}

    def problem(self, values: Sequence[Any]) -> str | None:
        """What is wrong with a row's values; never what they are."""
        for name, value in zip(self.names, values, strict=True):
            if value is None:
                if name == self.id_field:
                    return f"no id in {name!r}"
            elif not _fits(value, self.types[name]):
                return f"{name!r} is no {self.types[name]}, which the first rows have"
        return None

    def written(self, rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
        """The values by column; lists and objects of JSON as text."""
        return {
            name: [
                orjson.dumps(row[place]).decode()
                if self.types[name] == "json" and row[place] is not None
                else row[place]
                for row in rows
            ]
            for place, name in enumerate(self.names)
        }

    def arrow_type(self, name: str) -> Any:
        import pyarrow

        kind = self.types[name]
        if not isinstance(kind, str):
            return kind
        return {
            "bool": pyarrow.bool_,
            "int64": pyarrow.int64,
            "double": pyarrow.float64,
            "string": pyarrow.string,
            "json": pyarrow.string,
        }[kind]()


NONE = Columns()


def columns_of(names: Sequence[str], id_field: str | None, sources: Sequence[Source]) -> Columns:
    """Raises SettingsError for what these inputs cannot have, InputFileError for what they lack."""
    if not names:
        return NONE
    for name in names:
        if name in _OURS:
            raise SettingsError(f"--keep {name}: the output has a column of that name already")
    for source in sources:
        if source.kind is Kind.TEXT:
            flag = "--id-field" if id_field == names[0] else "--keep"
            raise SettingsError(f"{flag} names a field, and {source.name} is text")
    tabular = next((source for source in sources if source.kind is Kind.PARQUET), None)
    if tabular is None:
        types: Mapping[str, Any] = _types_of_json(names, sources[0])
    else:
        types = parquet_types(tabular)
        if missing := [name for name in names if name not in types]:
            raise InputFileError(
                f"{tabular.name} has no column {missing[0]!r}; it has {', '.join(types)}"
            )
        tabular.close()
    return Columns(tuple(names), id_field, {name: types[name] for name in names})


def _types_of_json(names: Sequence[str], source: Source) -> dict[str, str]:
    seen: dict[str, set[str]] = {name: set() for name in names}
    lines = source.head(_HEAD_BYTES).split(b"\n")
    for raw in lines[:-1] or lines:
        try:
            value = json_text.loads(raw)
        except ValueError:
            continue  # its reading says what is wrong
        if isinstance(value, dict):
            for name in names:
                if value.get(name) is not None:
                    seen[name].add(_word(value[name]))
    return {name: _common(words) for name, words in seen.items()}


def _word(value: Any) -> str:
    return next((word for word, kind in _JSON.items() if type(value) is kind), "json")


def _common(words: Iterable[str]) -> str:
    found = set(words)
    if found == {"int64", "double"}:
        return "double"
    return found.pop() if len(found) == 1 else "json"


def _fits(value: Any, kind: Any) -> bool:
    if kind == "json":
        return True
    if isinstance(kind, str):
        if kind == "double":
            return type(value) in (int, float)
        fits = type(value) is _JSON[kind]
        return fits and (kind != "int64" or -_INT64 <= int(value) < _INT64)
    return _is_arrow(value, kind)


def _is_arrow(value: Any, kind: Any) -> bool:
    import pyarrow

    try:
        pyarrow.array([value], type=kind)
    except (pyarrow.ArrowException, TypeError, OverflowError, ValueError):
        return False
    return True
