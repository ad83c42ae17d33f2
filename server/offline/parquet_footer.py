"""Parquet files made one without reading their rows: bodies end to end, and one footer.

A footer is Thrift's compact protocol (parquet.thrift: FileMetaData). It is read into fields and
written again; what changes is the list of row groups, their number of rows, and the places where
their column chunks begin. Knows no column and no type.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

MAGIC = b"PAR1"
_ROWS, _GROUPS = 3, 4  # of FileMetaData
_GROUP_COLUMNS, _GROUP_OFFSET, _GROUP_NUMBER = 1, 5, 7  # of RowGroup
_CHUNK_OFFSET, _CHUNK_METADATA = 2, 3  # of ColumnChunk
_CHUNK_INDEXES = (4, 6)
_PAGE_OFFSETS = (9, 10, 11, 14)  # of ColumnMetaData: data, index, dictionary, bloom filter

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


class Value(NamedTuple):
    """A field of a struct; of an element of a list only `value` counts."""

    kind: int
    value: Any


class List(NamedTuple):
    kind: int
    values: list[Any]


class Map(NamedTuple):
    kinds: tuple[int, int]
    pairs: list[tuple[Any, Any]]


Struct = dict[int, Value]


def split(file: BinaryIO) -> tuple[int, int, bytes]:
    """Where the body of a Parquet file begins, how long it is, and the footer."""
    end = file.seek(-8, 2)
    size, magic = struct.unpack("<I4s", file.read(8))
    assert magic == MAGIC, magic
    file.seek(end - size)
    return len(MAGIC), end - size - len(MAGIC), file.read(size)


def joined(footers: Sequence[bytes], shifts: Sequence[int]) -> bytes:
    """What ends a file of several bodies; shifts: how far each was moved from its place."""
    whole = read(footers[0])
    groups: list[Struct] = []
    rows = 0
    for footer, shift in zip(footers, shifts, strict=True):
        one = read(footer)
        rows += one[_ROWS].value
        for group in one[_GROUPS].value.values:
            _move_group(group, shift, len(groups))
            groups.append(group)
    whole[_ROWS] = Value(_I64, rows)
    whole[_GROUPS] = Value(_LIST, List(_STRUCT, groups))
    written = write(whole)
    return written + struct.pack("<I", len(written)) + MAGIC


def _move_group(group: Struct, shift: int, number: int) -> None:
    for chunk in group[_GROUP_COLUMNS].value.values:
        # Writers give 0 where the chunk's own metadata stands in the footer alone.
        _move(chunk, _CHUNK_OFFSET, shift)
        for place in _CHUNK_INDEXES:
            _move(chunk, place, shift)
        for place in _PAGE_OFFSETS:
            _move(chunk[_CHUNK_METADATA].value, place, shift)
    _move(group, _GROUP_OFFSET, shift)
    if _GROUP_NUMBER in group:
        if number < 1 << 15:
            group[_GROUP_NUMBER] = Value(_I16, number)
        else:  # it has 16 bits, and need not be there
            del group[_GROUP_NUMBER]


def _move(fields: Struct, place: int, shift: int) -> None:
    if place in fields and fields[place].value:
        fields[place] = Value(fields[place].kind, fields[place].value + shift)


# Thrift's compact protocol


def read(raw: bytes) -> Struct:
    """The fields of a struct by their numbers."""
    return _Reader(raw).struct()


def write(fields: Struct) -> bytes:
    out = bytearray()
    _write_struct(out, fields)
    return bytes(out)


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self._raw, self._at = raw, 0

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while head := self._byte():
            kind, ahead = head & 15, head >> 4
            number = number + ahead if ahead else _unzigzag(self._varint())
            value = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)
            fields[number] = Value(kind, value)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):  # within a list a boolean is a byte
            return self._byte()
        if kind in (_I16, _I32, _I64):
            return _unzigzag(self._varint())
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            return List(head & 15, [self._value(head & 15) for _ in range(count)])
        if kind == _MAP:
            count = self._varint()
            kinds = divmod(self._byte(), 16) if count else (0, 0)
            pairs = [(self._value(kinds[0]), self._value(kinds[1])) for _ in range(count)]
            return Map(kinds, pairs)
        assert kind == _STRUCT, kind
        return self.struct()

    def _byte(self) -> int:
        self._at += 1
        return self._raw[self._at - 1]

    def _bytes(self, count: int) -> bytes:
        self._at += count
        return self._raw[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value


def _unzigzag(value: int) -> int:
    return (value >> 1) ^ -(value & 1)


def _write_struct(out: bytearray, fields: Struct) -> None:
    before = 0
    for number in sorted(fields):
        kind, value = fields[number]
        if kind in (_TRUE, _FALSE):
            kind = _TRUE if value else _FALSE
        if 0 < number - before < 16:
            out.append((number - before) << 4 | kind)
        else:
            out.append(kind)
            _write_varint(out, number << 1)
        before = number
        if kind not in (_TRUE, _FALSE):
            _write_value(out, kind, value)
    out.append(0)


def _write_value(out: bytearray, kind: int, value: Any) -> None:
    if kind in (_TRUE, _FALSE, _BYTE):
        out.append(value)
    elif kind in (_I16, _I32, _I64):
        _write_varint(out, value << 1 if value >= 0 else (-value << 1) - 1)
    elif kind == _DOUBLE:
        out += value
    elif kind == _BINARY:
        _write_varint(out, len(value))
        out += value
    elif kind in (_LIST, _SET):
        count = len(value.values)
        out.append(min(count, 15) << 4 | value.kind)
        if count >= 15:
            _write_varint(out, count)
        for item in value.values:
            _write_value(out, value.kind, item)
    elif kind == _MAP:
        _write_varint(out, len(value.pairs))
        if value.pairs:
            out.append(value.kinds[0] << 4 | value.kinds[1])
        for pair in value.pairs:
            for inner, item in zip(value.kinds, pair, strict=True):
                _write_value(out, inner, item)
    else:
        assert kind == _STRUCT, kind
        _write_struct(out, value)


def _write_varint(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
