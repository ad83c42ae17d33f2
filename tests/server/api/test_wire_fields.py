"""Every field of POST /v1/embeddings, alone: a value is legal and answered, or it is refused with
a 4xx in the one envelope that names the field. What is legal is said here once more, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.instructions import INPUT_TYPES, TASKS
from tests.server.fakes import AppInProcess, in_process
from tests.server.runners import WIDTH

NAMES = ["golden-embed", "golden-embed-query", "golden-embed-passage", "GOLDEN-EMBED"]
TEXT = "wizards vex"
VOCABULARY = 32_000

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=30)
scalars |= st.floats(allow_nan=False, allow_infinity=False)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ids = st.lists(st.integers(-1, VOCABULARY), max_size=6)
ids |= st.lists(st.integers(3, VOCABULARY - 1), max_size=20).map(lambda ids: [1, *ids, 2])
inputs = ids | st.lists(ids, max_size=3) | st.lists(st.text(max_size=20) | scalars, max_size=4)


def is_int(value: Any) -> bool:
    return type(value) is int


def absent_or(legal: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or legal(value)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_ids(value: Any) -> bool:
    """BOS once and first, EOS last, all in the vocabulary."""
    return (
        isinstance(value, list)
        and len(value) >= 2
        and all(map(is_int, value))
        and (value[0], value[-1]) == (1, 2)
        and all(0 <= number < VOCABULARY and number != 1 for number in value[1:])
    )


def is_input(value: Any) -> bool:
    def is_good_text(item: Any) -> bool:
        return is_text(item) and item != ""

    if is_good_text(value) or is_ids(value):
        return True
    return (
        isinstance(value, list)
        and bool(value)
        and (all(map(is_good_text, value)) or all(map(is_ids, value)))
    )


def is_truncation(value: Any) -> bool:
    named = is_text(value) and value.lower() in ("none", "end", "start", "left", "right")
    return isinstance(value, bool) or named


def is_task(value: Any) -> bool:
    known = {*(name.lower() for name in TASKS), *OTHER_TASKS}
    return is_text(value) and (not value or value.lower() in known)


def is_input_type(value: Any) -> bool:
    return is_text(value) and (not value or value.lower() in INPUT_TYPES)


def is_dimensions(value: Any) -> bool:
    return is_int(value) and value in (WIDTH, 0)


def is_dtype(value: Any) -> bool:
    return is_text(value) and value.lower() in DTYPES


def only(legal: bool) -> Callable[[Any], bool]:
    return absent_or(lambda value: value is legal)


DTYPES = ("float", "float32", "float16", "int8", "uint8", "binary", "ubinary")
OTHER_TASKS = ("retrieval.query", "retrieval.passage", "text-matching", "classification")
OTHER_TASKS += ("separation",)


def is_kept_tokens(value: Any) -> bool:
    return is_int(value) and (value == -1 or value >= 2)


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def is_empty_or_of_a_user(value: Any) -> bool:
    """Or of other fields that nobody knows."""
    return isinstance(value, dict) and not value.keys() & FIELDS.keys() - {"user", "surprise"}


ONLY_FALSE = ("late_chunking", "return_multivector")
ONLY_TRUE = ("normalize", "normalized", "use_activation", "activation")
FIELDS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bool]]] = {
    "model": (
        one_of(*NAMES, "gpt-4"),
        absent_or(lambda value: is_text(value) and value.lower() in {n.lower() for n in NAMES}),
    ),
    "input": (inputs, is_input),
    "encoding_format": (
        one_of("float", "base64", "FLOAT", "int8"),
        absent_or(lambda value: value in ("float", "base64")),
    ),
    "dimensions": (one_of(WIDTH, WIDTH - 1, WIDTH + 1, 0, 64.0), absent_or(is_dimensions)),
    "output_dimension": (one_of(WIDTH, 1), absent_or(is_dimensions)),
    "user": (scalars, lambda _: True),
    "prompt": (st.text(max_size=200), absent_or(is_text)),
    "instruction": (st.text(max_size=200), absent_or(is_text)),
    "task": (one_of("", "NQ", "nq", "STS", "no such task"), absent_or(is_task)),
    "input_type": (one_of("", "query", "Query", *INPUT_TYPES), absent_or(is_input_type)),
    "prompt_name": (one_of("query", "s2p_query"), absent_or(is_input_type)),
    "truncate": (one_of("NONE", "End", "start", "middle"), absent_or(is_truncation)),
    "truncation": (one_of(True, False, "left"), absent_or(is_truncation)),
    "truncate_prompt_tokens": (st.integers(-3, 5), absent_or(is_kept_tokens)),
    "truncation_side": (one_of("left", "right", "Left"), absent_or(lambda _: False)),
    "add_special_tokens": (one_of(True, False), only(True)),
    "output_dtype": (one_of(*DTYPES, "FLOAT16", "bfloat16"), absent_or(is_dtype)),
    "embed_dtype": (one_of(*DTYPES, "fp8"), absent_or(is_dtype)),
    "embedding_type": (
        one_of(*DTYPES, "base64"),
        absent_or(lambda value: is_dtype(value) or value == "base64"),
    ),
    "endianness": (
        one_of("native", "little", "big", "middle"),
        absent_or(lambda value: value in ("native", "little", "big")),
    ),
    **{name: (one_of(True, False), only(True)) for name in ONLY_TRUE},
    **{name: (one_of(True, False), only(False)) for name in ONLY_FALSE},
    **{name: (scalars, absent_or(lambda _: False)) for name in ("messages", "images", "image")},
    "extra_body": (one_of({}, {"user": "a"}), absent_or(is_empty_or_of_a_user)),
    "embedding_types": (
        one_of(["float"], ["int8"], ["float", "int8"]),
        absent_or(lambda value: isinstance(value, list) and len(value) == 1 and is_dtype(value[0])),
    ),
    "surprise": (scalars, lambda _: True),
}

ALIASES = {
    "output_dimension": "dimensions",
    "prompt_name": "input_type",
    "truncation": "truncate",
    "embedding_types": "embedding_type",
}
"""A refusal may name the field by either."""


@pytest.fixture(scope="module")
def server(golden_checkpoint: Path) -> Iterator[AppInProcess]:
    with in_process(golden_checkpoint, access_log=False) as server:
        yield server


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_legal_or_named(server: AppInProcess, name: str) -> None:
    near, is_legal = FIELDS[name]
    seen = set()

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(value=near | anything)
    def check(value: Any) -> None:
        fields = {"model": "golden-embed", "input": TEXT, name: value}
        answer = server.client.post("/v1/embeddings", json=fields)
        seen.add(answer.status_code)
        if is_legal(value):
            assert answer.status_code == 200, answer.text
            asked = fields["input"]
            many = isinstance(asked, list) and not is_int(asked[0])
            assert len(answer.json()["data"]) == (len(asked) if many else 1)
            return
        assert answer.status_code == (404 if name == "model" and is_text(value) else 400)
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert error["param"].partition("[")[0] in (name, ALIASES.get(name))

    check()
    assert 200 in seen
