"""Values of Arrow's columns as Python's, none of them rounded, the same whatever is installed.

Python's times end at microseconds; Arrow itself gives pandas' where pandas is. A time with
nanoseconds is a Nanos here, and is written as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

UNREADABLE = object()
"""What Python has no value for."""


class Nanos(NamedTuple):
    """A moment, a time of day or a duration that is no whole number of microseconds.

    value: Arrow's number. kind: Arrow's type, as it is written. text: as Python writes such a time,
    with nine digits.
    """

    value: int
    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


def values_of(column: Any) -> list[Any]:
    """Of an array; UNREADABLE for what Python has no value for."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    coarse = _in_microseconds(column.type)
    try:
        found: list[Any] = (column if coarse == column.type else column.cast(coarse)).to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError):
        return [_value(cell, coarse) for cell in column]
    return found


def array_of(values: Sequence[Any], kind: Any) -> Any:
    """The array that values_of has these values of."""
    import pyarrow

    array = pyarrow.array([None if isinstance(one, Nanos) else one for one in values], type=kind)
    if not any(isinstance(one, Nanos) for one in values):
        return array
    whole = array.cast(pyarrow.int64()).to_pylist()
    numbers = [
        one.value if isinstance(one, Nanos) else number
        for one, number in zip(values, whole, strict=True)
    ]
    return pyarrow.array(numbers, type=pyarrow.int64()).cast(kind)


def _value(cell: Any, coarse: Any) -> Any:
    import pyarrow

    try:
        is_time = coarse != cell.type and not pyarrow.types.is_nested(coarse)
        if is_time and cell.is_valid and (rest := cell.value % 1000):
            whole = pyarrow.scalar(cell.value // 1000, pyarrow.int64()).cast(coarse).as_py()
            return Nanos(cell.value, f"{cell.type}", _text(whole, rest))
        return (cell if coarse == cell.type else cell.cast(coarse)).as_py()
    except (pyarrow.ArrowException, ValueError, OverflowError):
        return UNREADABLE


def _text(whole: Any, rest: int) -> str:
    """whole: down to microseconds; rest: nanoseconds beside them."""
    if isinstance(whole, timedelta):
        return f"{whole}{'' if whole.microseconds else '.000000'}{rest:03}"
    text = whole.isoformat(timespec="microseconds")
    end = text.index(".") + 7
    return f"{text[:end]}{rest:03}{text[end:]}"


def _in_microseconds(kind: Any) -> Any:
    """The same type, at any depth, with what Python's times can hold."""
    import pyarrow

    types = pyarrow.types
    if types.is_timestamp(kind) and kind.unit == "ns":
        return pyarrow.timestamp("us", kind.tz)
    if types.is_duration(kind) and kind.unit == "ns":
        return pyarrow.duration("us")
    if types.is_time64(kind) and kind.unit == "ns":
        return pyarrow.time64("us")
    if types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return pyarrow.struct([one.with_type(_in_microseconds(one.type)) for one in fields])
    if types.is_map(kind):
        return pyarrow.map_(_in_microseconds(kind.key_type), _in_microseconds(kind.item_type))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = kind.value_field.with_type(_in_microseconds(kind.value_type))
        if types.is_fixed_size_list(kind):
            return pyarrow.list_(inner, kind.list_size)
        return (pyarrow.list_ if types.is_list(kind) else pyarrow.large_list)(inner)
    return kind
