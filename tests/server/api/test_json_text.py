"""What is read though RFC 8259 would not write it, and what is refused in words of our own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.json_text import JSONTextError, loads

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(values)
def test_json_is_read(value: Any) -> None:
    assert loads(json.dumps(value).encode()) == value


@given(st.text(st.characters(exclude_categories=[]), max_size=30))
def test_half_pairs_are_replaced_and_nothing_else_is(text: str) -> None:
    """As an encoder to UTF-16 that replaces what it cannot write; whole pairs stay."""
    units = text.encode("utf-16-le", "surrogatepass")
    assert loads(json.dumps(text).encode()) == units.decode("utf-16-le", "replace")


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (rb'"a\ud83d"', "a\ufffd"),
        (rb'"\uDE00b"', "\ufffdb"),
        (rb'"\ud83d\ud83d\ude00\ude00"', "\ufffd\U0001f600\ufffd"),
        (rb'"\\ud83d"', r"\ud83d"),  # a backslash and five letters
        (rb'"\\\ud83d"', "\\\ufffd"),
        (rb'{"\ud83d": "\ud83d\u0041"}', {"\ufffd": "\ufffdA"}),
        (b"\xef\xbb\xbf[1]", [1]),
        (b'\xef\xbb\xbf{"a": "\\ud83d"}', {"a": "\ufffd"}),
        (b'{"a": Infinity, "b": 1e400}', {"a": math.inf, "b": math.inf}),
    ],
)
def test_what_producers_write(raw: bytes, value: Any) -> None:
    assert loads(raw) == value


def test_nan_is_a_number() -> None:
    assert math.isnan(loads(b'{"score": NaN}')["score"])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "Expecting value"),
        (b"\xef\xbb\xbf", "Expecting value"),
        (b'{"a": secret}', "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[NaN, " + b"9" * 5000 + b"]", "too many digits"),
        (b'"\xe9"', r"not UTF-8 \(byte 2\)"),
        (b'"\xed\xa0\xbd"', "not UTF-8"),  # a half pair written as bytes is no UTF-8 at all
        ("[1]".encode("utf-16"), "not UTF-8"),
        (rb'"\ud83"', "escape"),
        (b"{}{}", "Extra data"),
    ],
)
def test_what_is_refused(raw: bytes, words: str) -> None:
    with pytest.raises(JSONTextError, match=words) as caught:
        loads(raw)
    assert "secret" not in str(caught.value)
