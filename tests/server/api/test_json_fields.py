"""The reader of large bodies says what the whole parser says, wherever its pieces end."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.json_fields import KEPT_CHARS, STEP, read_fields
from server.api.json_text import JSONTextError, loads
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_INPUTS, MAX_REQUEST_TOKENS

WANTED = ("input", "model", "prompt", "dimensions")
text = st.text(st.characters(exclude_categories=[]), max_size=60)
text |= st.text('\\"u𝕬🙂[]{},: \ud83d\ude00', max_size=60)
scalar = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | text
anything = st.recursive(
    scalar, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=15
)
ids = st.lists(st.integers(0, 2**20), max_size=30)
inputs = text | st.lists(text, max_size=8) | ids | st.lists(ids, max_size=5)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    fields = draw(st.dictionaries(text, anything, max_size=4))
    fields |= draw(
        st.fixed_dictionaries(
            {"input": inputs},
            optional={"model": text, "prompt": text, "dimensions": st.none() | st.integers(1, 99)},
        )
    )
    names = draw(st.permutations(list(fields)))
    dumped = json.dumps(
        {name: fields[name] for name in names},
        ensure_ascii=draw(st.booleans()),
        indent=draw(st.sampled_from([None, 1])),
    )
    mark = b"\xef\xbb\xbf" if draw(st.booleans()) else b""
    return (
        mark + dumped.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
    )


@given(bodies(), st.integers(32, 64))
def test_it_reads_what_the_whole_parser_reads(body: bytes, step: int) -> None:
    fields, others = read_fields(body, WANTED, step)
    whole = loads(body)
    assert fields == {name: value for name, value in whole.items() if name in WANTED}
    assert set(others) == whole.keys() - set(WANTED)


@given(bodies(), st.data())
def test_broken_bodies_are_refused_or_read_alike(body: bytes, data: st.DataObject) -> None:
    """One byte less, or another one: never another error, never other values."""
    at = data.draw(st.integers(0, len(body) - 1))
    other = data.draw(st.sampled_from([b"", b'"', b"\\", b"[", b"}", b",", b"\xff", b"0"]))
    broken = body[:at] + other + body[at + 1 :]
    try:
        fields, _ = read_fields(broken, WANTED, 32)
    except (JSONTextError, InvalidRequestError):
        return
    try:
        whole = loads(broken)
    except JSONTextError:
        return  # in what was passed over, or a part of the rest
    assert fields == {name: value for name, value in whole.items() if name in WANTED}


BOMBS = {
    "lists in input": b'{"input":[' + b"[0]," * 500_000 + b"[0]]}",
    "empty lists in input": b'{"input":[' + b"[]," * 700_000 + b"[]]}",
    "empty texts": b'{"input":[' + b'"",' * 700_000 + b'""]}',
    "objects": b'{"input":[' + b"{}," * 700_000 + b"{}]}",
    "ids": b'{"input":[' + b"1," * 1_000_000 + b"2]}",
    "lists of ids": b'{"input":[' + b"[1,2,3,4]," * 2000 + b"[" + b"7," * 500_000 + b"2]]}",
    "lists in another field": b'{"x":[' + b"[0]," * 500_000 + b'[0]],"input":"a"}',
    "objects in another field": b'{"x":[' + b'{"":0},' * 300_000 + b'0],"input":"a"}',
    "depth": b'{"x":' + b"[" * 2_000_000,
    "depth of objects": b'{"input":' + b'{"a":' * 400_000,
    "fields": b"{" + b",".join(b'"%d":0' % i for i in range(200_000)) + b',"input":"a"}',
    "a list for a model": b'{"model":[' + b"0," * 1_000_000 + b'0],"input":"a"}',
    "a number": b'{"dimensions":' + b"9" * 2_000_000 + b',"input":"a"}',
    "half pairs": b'{"input":"a","x":{' + rb'"\ud83d":0,' * 150_000 + b'"":0}}',
    "no end": b'{"input":"' + b"a" * 2_000_000,
    "escapes without end": b'{"input":"' + b"\\" * 2_000_001,
}


@pytest.mark.whole  # megabytes, with each allocation counted
@pytest.mark.parametrize("shape", BOMBS)
def test_bombs_are_refused_before_they_become_objects(shape: str) -> None:
    body = BOMBS[shape]
    tracemalloc.start()
    try:
        with pytest.raises((JSONTextError, InvalidRequestError)):
            read_fields(body, WANTED)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6 + len(body), f"{shape}: {peak / 1e6:.0f} MB"


def test_the_limits_themselves_are_legal() -> None:
    texts = ["é" * 40] * MAX_REQUEST_INPUTS
    assert read_fields(json.dumps({"input": texts}).encode(), WANTED)[0] == {"input": texts}
    numbers = list(range(MAX_REQUEST_TOKENS))
    assert read_fields(json.dumps({"input": numbers}).encode(), WANTED)[0] == {"input": numbers}
    lists = [[1, 300, 2]] * MAX_REQUEST_INPUTS
    assert read_fields(json.dumps({"input": lists}).encode(), WANTED)[0] == {"input": lists}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ["a"] * (MAX_REQUEST_INPUTS + 1)}, "input"),
        ({"input": [[1]] * (MAX_REQUEST_INPUTS + 1)}, "input"),
        ({"input": [1] * (MAX_REQUEST_TOKENS + 1)}, "input"),
        ({"input": [[1], ["a"]]}, "input[1]"),
        ({"input": [1, "a"]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": "a", "dimensions": ["a"] * 50_000}, "dimensions"),
    ],
)
def test_a_refusal_names_the_field(body: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_fields(json.dumps(body).encode(), WANTED)
    assert caught.value.param == param


def test_of_a_very_long_text_both_ends_are_kept() -> None:
    """No truncation could keep any of what lies between them."""
    begin, end = "begin 🙂" + "a" * KEPT_CHARS, "b" * KEPT_CHARS + " end\n"
    body = json.dumps({"input": ["x", begin + "middle " * 10**6 + end]}, ensure_ascii=False)
    kept = read_fields(body.encode(), WANTED)[0]["input"][1]
    assert kept.startswith(begin[:KEPT_CHARS])
    assert kept.endswith(end[-KEPT_CHARS:])
    assert len(kept) < 2 * KEPT_CHARS + 200_000


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"7", b"[{}]", b"null"])
def test_it_must_be_an_object(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="must be a JSON object"):
        read_fields(body, WANTED)


SIZE = 4_000_000
LARGE = {
    "texts": b'{"input": [%b]}' % b",".join([b'"%b"' % (b"word " * 500)] * (SIZE // 2500)),
    "ids": b'{"input": [%b]}' % b",".join([b"[%b1]" % (b"12345678901234, " * 125)] * 2000),
    "one text": b'{"input": "%b"}' % (b"word " * (SIZE // 5)),
    "escapes": b'{"input": "%b"}' % (b"\\u00e4" * (SIZE // 6)),
    "nobody wants": b'{"x": [%b]}'
    % b",".join([b'{"a": "%b"}' % (b"word " * 500)] * (SIZE // 2500)),
    "a long name": b'{"%b": 1}' % (b"word " * (SIZE // 5)),
    "spaces": b'{"input":%b"a"}' % (b" " * SIZE),
}


@pytest.mark.parametrize("shape", LARGE)
def test_others_may_go_on_after_each_step(shape: str) -> None:
    """Whatever a body is made of: no part of it is read in one go."""
    body, stops = LARGE[shape], 0

    def between() -> None:
        nonlocal stops
        stops += 1

    read_fields(body, WANTED, between=between)
    assert stops >= len(body) // (2 * STEP) - 1
    assert stops <= len(body) // STEP
