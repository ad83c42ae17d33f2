"""What is carried from a row to its vector: an id, and columns that were chosen.

Owns their types, which every shard has to have alike: those of the first Parquet file, or what the
first lines of JSON show. A value that its type would change is refused. Knows nothing of models,
nor of how a file is written.
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
from server.offline.times import Nanos, values_of

_HEAD_BYTES = 64 << 10
"""Of the first file of JSON lines: its rows tell the types."""
_LOOK_BYTES = 1 << 20
"""Of a file in which a field has no value so far."""
_LOOK_FILES = 16
_LONGEST_BYTES = 64 << 20
"""Of a first row that is longer."""
_OURS = ("index", "embedding")
_INT64 = 1 << 63
_JSON = {"bool": bool, "int64": int, "double": float, "string": str}


@dataclass(frozen=True, slots=True)
class Columns:
    """Names, in the order of the output, and types: Arrow's of Parquet, else a word of JSON's."""

    names: tuple[str, ...] = ()
    id_field: str | None = None
    types: Mapping[str, Any] = field(default_factory=dict)
    unseen: frozenset[str] = frozenset()  # the first rows have no value of these

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
                if self.types[name] == "json":
                    return f"{name!r} cannot be kept as JSON text: too deep, or NaN, or too large"
                if name in self.unseen:
                    return (
                        f"{name!r} is no string, and the first rows have no value that tells its "
                        "type: put a row that has one first, or leave it out of --keep"
                    )
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
        types, unseen = _types_of_json(names, sources)
        return Columns(tuple(names), id_field, types, unseen)
    found = parquet_types(tabular, names)
    tabular.close()
    return Columns(tuple(names), id_field, {name: found[name] for name in names})


def _types_of_json(
    names: Sequence[str], sources: Sequence[Source]
) -> tuple[dict[str, str], frozenset[str]]:
    """The types, and which names have no value in what was looked at: they are strings, as long as
    their values are. The same for every part of a run. Raises InputFileError."""
    words: dict[str, set[str]] = {}
    fields: dict[str, None] = {}
    for source in sources[:_LOOK_FILES]:
        for size in (_HEAD_BYTES, _LOOK_BYTES):
            seen, there = _words_of(names, source, size)
            fields |= there
            for name, found in seen.items():
                words.setdefault(name, found)
            if len(words) == len(names):
                break
        if len(sources) > 1:
            source.close()
        if len(words) == len(names):
            break
    for name in names:
        if fields and name not in fields:
            raise InputFileError(
                f"the first rows of {sources[0].name} have no field {name!r} (null in the first "
                f"says that it comes later); they have {', '.join(fields)}"
            )
    types = {name: _common(words[name]) if name in words else "string" for name in names}
    return types, frozenset(names) - words.keys()


def _words_of(
    names: Sequence[str], source: Source, size: int
) -> tuple[dict[str, set[str]], dict[str, None]]:
    """Words for the values in a file's first rows, and all fields there; at least a whole row."""
    head = source.head(size)
    while b"\n" not in head.lstrip() and size < _LONGEST_BYTES:
        size *= 4
        longer = source.head(size)
        if len(longer) == len(head):
            break
        head = longer
    words: dict[str, set[str]] = {}
    fields: dict[str, None] = {}
    for raw in head.split(b"\n"):
        try:
            value = json_text.loads(raw)
        except ValueError:
            continue  # cut off; or its reading says what is wrong
        if isinstance(value, dict):
            fields |= dict.fromkeys(value)
            for name in names:
                if value.get(name) is not None:
                    words.setdefault(name, set()).add(_word(value[name]))
    return words, fields


def _word(value: Any) -> str:
    return next((word for word, kind in _JSON.items() if type(value) is kind), "json")


def _common(words: Iterable[str]) -> str:
    found = set(words)
    if found == {"int64", "double"}:
        return "double"
    return found.pop() if len(found) == 1 else "json"


def _fits(value: Any, kind: Any) -> bool:
    """Whether it can be written as this type, and read again as what it is."""
    if kind == "json":
        try:
            return _same(orjson.loads(orjson.dumps(value)), value)
        except (TypeError, ValueError, RecursionError):
            return False
    if not isinstance(kind, str):
        return _is_arrow(value, kind)
    if kind == "double" and type(value) is int:
        return abs(value) < _INT64 and int(float(value)) == value
    fits = type(value) is _JSON[kind]
    return fits and (kind != "int64" or -_INT64 <= value < _INT64)


def _is_arrow(value: Any, kind: Any) -> bool:
    import pyarrow

    if isinstance(value, Nanos):
        return value.kind == f"{kind}"
    try:
        return _same(values_of(pyarrow.array([value], type=kind))[0], value)
    except (pyarrow.ArrowException, TypeError, OverflowError, ValueError, RecursionError):
        return False


def _same(found: Any, value: Any) -> bool:
    """Equal and of one type, in all that it holds; a whole number may be a float of that value."""
    if type(found) is not type(value):
        return type(found) is float and type(value) is int and found == value
    if isinstance(value, dict):
        return found.keys() == value.keys() and all(
            _same(found[key], one) for key, one in value.items()
        )
    if isinstance(value, list | tuple):
        return len(found) == len(value) and all(map(_same, found, value))
    return bool(found == value) or bool(found != found and value != value)  # NaN
