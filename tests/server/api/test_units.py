"""Small pure parts of the edge: wire frames, inputs, names, instructions, answers, errors."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from model.batch import Encoding
from model.families import BGE_EN_ICL, E5_MISTRAL, FAMILIES, GRITLM, NEMOTRON_3_EMBED, Family, Side
from model.prompts import Example, Marker, Prompt, written
from model.tasks import TASKS, prefix_of
from server.api import parsing, schemas, serialize
from server.api.instructions import Defaults, PromptFields, choose_prompt
from server.api.names import ServedNames
from server.api.openai_errors import error_body
from server.api.vector_format import VectorFormat, cut
from server.engine import wire
from server.engine.wire import Fault
from server.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
)

# The worker's frames


def payload_of(data: bytes) -> tuple[wire.Kind, int, int, int, bytes]:
    kind, batch_id, rows, bad, size = wire.HEADER.unpack(data[: wire.HEADER.size])
    assert len(data) == wire.HEADER.size + size
    return wire.Kind(kind), batch_id, rows, bad, data[wire.HEADER.size :]


def test_a_batch_survives_the_wire() -> None:
    sent = [Encoding(np.arange(n, dtype=np.int32), n // 2) for n in (1, 7, 3)]
    kind, batch_id, rows, _, payload = payload_of(wire.batch_frame(41, sent))
    assert (kind, batch_id, rows) == (wire.Kind.BATCH, 41, 3)
    for got, expected in zip(wire.read_batch(rows, payload), sent, strict=True):
        np.testing.assert_array_equal(got.ids, expected.ids)
        assert got.pool_start == expected.pool_start


@pytest.mark.parametrize("faults", [{}, {1: Fault.NOT_FINITE}, {0: Fault.NO_MEMORY, 2: Fault(1)}])
def test_rows_and_faults_survive_the_wire(faults: dict[int, Fault]) -> None:
    sent = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    kind, batch_id, rows, count, payload = payload_of(wire.rows_frame(9, sent, faults))
    assert (kind, batch_id) == (wire.Kind.ROWS, 9)
    got, named = wire.read_rows(rows, count, payload)
    np.testing.assert_array_equal(got, sent)
    assert named == faults


# The inputs of a request


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 5, 2], [[1, 5, 2]]),
        ([[1, 2], [1, 5, 2]], [[1, 2], [1, 5, 2]]),
        (" ", [" "]),
    ],
)
def test_input_forms(value: object, expected: object) -> None:
    assert parsing.parse_inputs(value) == expected


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("", "input"),
        ([], "input"),
        (None, "input"),
        (5, "input"),
        ({"text": "a"}, "input"),
        (["a", 5], "input"),
        (["a", [1, 2]], "input"),
        ([1, True], "input"),
        ([True], "input"),
        ([1.5], "input"),
        (["a", ""], "input[1]"),
        ([[1, 2], []], "input[1]"),
        ([[1, 2], [1, "x"]], "input[1]"),
        ([[1, 2], [1, False]], "input[1]"),
        ([None, None], "input[0]"),
        (["a"] * 2049, "input"),
    ],
)
def test_refused_inputs_name_the_place(value: object, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parsing.parse_inputs(value)
    assert caught.value.param == param


def test_null_is_absent_and_unknown_fields_are_ignored() -> None:
    names = schemas.EmbeddingsRequest.model_fields.keys() - {"model", "input"}
    body = {"model": "m", "input": "x", "surprise": 1, **dict.fromkeys(names)}
    wire = parsing.read_body(schemas.EmbeddingsRequest, json.dumps(body).encode())[0]
    assert wire.model_dump(exclude_none=True) == {"model": "m", "input": "x"}


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"input_type": None, "prompt_name": "query"}, "input_type", "query"),
        ({"dimensions": None, "output_dimension": 8}, "dimensions", 8),
        ({"truncate": None, "truncation": True}, "truncate", "end"),
    ],
)
def test_a_null_does_not_hide_another_name(fields: dict, name: str, value: object) -> None:
    body = json.dumps({"model": "m", "input": "x", **fields}).encode()
    assert getattr(parsing.read_body(schemas.EmbeddingsRequest, body)[0], name) == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, "end"), (False, "none"), ("END", "end"), ("START", "start"), ("none", "none")],
)
@pytest.mark.parametrize("name", ["truncate", "truncation"])
def test_truncate(name: str, value: object, expected: str) -> None:
    body = json.dumps({"model": "m", "input": "x", name: value}).encode()
    assert parsing.read_body(schemas.EmbeddingsRequest, body)[0].truncate == expected


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"{", None, "not valid JSON"),
        (b"", None, "not valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b'{"model": "m"}', "input", "you must provide the field 'input'"),
        (b'{"model": 5, "input": "x"}', "model", "valid string"),
        (b'{"model": "m", "input": "x", "dimensions": -1}', "dimensions", "greater than"),
        (b'{"input": "x", "normalize": false}', "normalize", "should be true. Vectors have length"),
        (b'{"model": "m", "input": "x", "dimensions": true}', "dimensions", "valid integer"),
        (b'{"model": "m", "input": "x", "encoding_format": "hex"}', "encoding_format", "'float'"),
        (b'{"model": "m", "input": "x", "truncate": "middle"}', "truncate", "'none', 'end'"),
        (b'{"model": "m", "input": "\\ud80"}', None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
    ],
)
def test_refused_bodies_name_the_field(body: bytes, param: str | None, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        parsing.read_body(schemas.EmbeddingsRequest, body)
    assert caught.value.param == param


# Model names


def test_served_names() -> None:
    names = ServedNames("nvidia/NV-Embed-v2")
    assert names.listed() == ["nv-embed-v2", "nv-embed-v2-query", "nv-embed-v2-passage"]
    assert names.side("nv-embed-v2") is None
    assert names.side("NV-Embed-v2-Query") == "query"
    assert names.side("nvidia/NV-Embed-v2-passage") == "passage"
    with pytest.raises(ModelNotFoundError, match="nv-embed-v2-query"):
        names.side("nv-embed-v1")


@pytest.mark.parametrize(
    ("model_id", "name"),
    [
        ("C:\\models\\My Model", "my-model-embed"),
        ("/models/NV-Embed-v2/", "nv-embed-v2"),
        ("my-lora", "my-lora-embed"),
        ("a model (2).v3", "a-model-2-.v3-embed"),
        ("two\nlines", "two-lines-embed"),
        ("模型", "模型-embed"),
        (".", "nv-embed"),
        ("..\\", "nv-embed"),
        ("~", "nv-embed"),
        ("", "nv-embed"),
    ],
)
def test_a_path_makes_a_usable_name(model_id: str, name: str) -> None:
    assert ServedNames(model_id).listed()[0] == name
    assert ServedNames(model_id).side(f"{name}-query") == "query"


def test_a_plain_name_wins_over_a_suffix() -> None:
    names = ServedNames("x", ["my-embed", "my-embed-query"])
    assert names.side("my-embed-query") is None
    assert names.side("my-embed-query-query") == "query"


# Instructions

SERVER = Defaults("Find answers")
NQ = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
QUORA = prefix_of(TASKS["QuoraRetrieval"].passage)


def prefix(defaults: Defaults, *, model_side: Side | None = None, **fields: str) -> str | None:
    chosen = choose_prompt(defaults, PromptFields(**fields), model_side).prompt
    assert chosen is None or not chosen.suffix
    return None if chosen is None else written(chosen.prefix)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"input_type": "query"}, "Instruct: Find answers\nQuery: "),
        ({"input_type": "search_query"}, "Instruct: Find answers\nQuery: "),
        ({"input_type": "document"}, ""),
        ({"input_type": ""}, ""),
        ({"input_type": "", "model_side": "query"}, ""),
        ({"model_side": "query"}, "Instruct: Find answers\nQuery: "),
        ({"model_side": "passage"}, ""),
        ({"input_type": "passage", "model_side": "query"}, ""),
        ({"task": "NQ"}, NQ),
        ({"task": "nq", "input_type": "passage"}, ""),
        ({"task": "NQ", "model_side": "passage"}, ""),
        ({"task": "NQ", "input_type": "query", "model_side": "passage"}, NQ),
        ({"task": "QuoraRetrieval", "input_type": "passage"}, QUORA),
        ({"task": ""}, ""),
        ({"instruction": "Do it", "task": "NQ"}, "Instruct: Do it\nQuery: "),
        ({"instruction": "", "task": "NQ"}, ""),
        ({"prompt": "verbatim ", "instruction": "Do it"}, "verbatim "),
        ({"prompt": "", "instruction": "Do it"}, ""),
    ],
)
def test_the_first_field_that_is_given_decides(fields: dict, expected: str | None) -> None:
    assert prefix(SERVER, **fields) == expected


def test_tasks_say_where_their_words_come_from() -> None:
    """The authors' 16; MTEB's where they publish none: classification and clustering."""
    by_source: dict[str, list[str]] = {"nv-embed": [], "mteb": []}
    for name, task in TASKS.items():
        by_source[task.source].append(name)
    assert len(by_source["nv-embed"]) == 16
    assert len(by_source["mteb"]) == 23
    assert all("Classification" in n or "Clustering" in n for n in by_source["mteb"])
    banking = prefix(SERVER, task="banking77classification", input_type="passage")
    text = "Given a online banking query, find the corresponding intents"
    assert banking == f"Instruct: {text}\nQuery: "


def test_the_servers_default_decides_last() -> None:
    defaults = Defaults.of("NQ", "query")
    assert prefix(defaults) == NQ
    assert prefix(defaults, model_side="passage") == ""
    assert prefix(Defaults.of("Find answers", "passage")) == ""


@pytest.mark.parametrize(
    ("fields", "param", "known"),
    [
        ({"input_type": "question"}, "input_type", "search_document"),
        ({"task": "nope"}, "task", "QuoraRetrieval"),
        ({"prompt": "x", "input_type": "question"}, "input_type", "search_document"),
    ],
)
def test_unknown_names_list_the_known_ones(fields: dict, param: str, known: str) -> None:
    with pytest.raises(InvalidRequestError, match=known) as caught:
        prefix(SERVER, **fields)
    assert caught.value.param == param


EXAMPLE = Example("Find it", "where?", "<query> there")
IN_EACH_FAMILY: list[tuple[Family, dict[str, Any], str, str]] = [
    (E5_MISTRAL, {"input_type": "query"}, "Instruct: Find answers\nQuery: ", ""),
    (E5_MISTRAL, {"input_type": "passage"}, "", ""),
    (GRITLM, {"instruction": "Do it"}, "<|user|>\nDo it\n<|embed|>\n", ""),
    (GRITLM, {"instruction": ""}, "<|embed|>\n", ""),
    (GRITLM, {"input_type": "passage"}, "<|embed|>\n", ""),
    (GRITLM, {"prompt": ""}, "", ""),
    (BGE_EN_ICL, {"task": "NQ"}, "<instruct>" + NQ[10:-8] + "\n<query>", "\n<response>"),
    (BGE_EN_ICL, {"instruction": ""}, "", "\n<response>"),
    (BGE_EN_ICL, {"input_type": "passage"}, "", ""),
    (NEMOTRON_3_EMBED, {"input_type": "query"}, "query: ", ""),
    (NEMOTRON_3_EMBED, {"input_type": "query", "instruction": ""}, "query: ", ""),
    (NEMOTRON_3_EMBED, {"input_type": "passage"}, "passage: ", ""),
]


@pytest.mark.parametrize(
    ("family", "fields", "before", "behind"),
    IN_EACH_FAMILY,
    ids=[f"{family.name} {fields}" for family, fields, *_ in IN_EACH_FAMILY],
)
def test_a_field_means_the_same_in_each_family(
    family: Family, fields: dict[str, Any], before: str, behind: str
) -> None:
    chosen = choose_prompt(Defaults("Find answers", family=family), PromptFields(**fields)).prompt
    assert chosen is not None
    assert (written(chosen.prefix), written(chosen.suffix)) == (before, behind)


def test_markers_of_a_template_are_none_in_a_users_text() -> None:
    fields = PromptFields(instruction="a <query> tag", examples=[EXAMPLE])
    chosen = choose_prompt(Defaults("", family=BGE_EN_ICL), fields).prompt
    assert chosen is not None
    assert chosen.prefix == (Marker("<instruct>"), "a <query> tag\n", Marker("<query>"))
    assert chosen.examples[-2:] == (Marker("<response>"), "<query> there\n\n")
    verbatim = choose_prompt(Defaults("", family=BGE_EN_ICL), PromptFields(prompt="<query>"))
    assert verbatim.prompt == Prompt((Marker("<query>"),))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_a_family_has_no_place_for_is_refused(family: Family) -> None:
    defaults = Defaults("Find answers", family=family)
    refused = {"examples": {"instruction": "", "examples": [EXAMPLE]}}
    if family.template is None:
        refused |= {"instruction": {"instruction": "Do it"}, "task": {"task": "NQ"}}
    for param, fields in refused.items():
        if param == "examples" and family.example:
            continue
        with pytest.raises(InvalidRequestError, match=f"a {family.name} model takes no") as caught:
            choose_prompt(defaults, PromptFields(**fields))
        assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"input_type": "passage"},
        {"input_type": "passage", "instruction": ""},
        {"prompt": "x"},
        {"task": ""},
    ],
    ids=str,
)
def test_examples_are_never_left_out_unsaid(fields: dict[str, str]) -> None:
    asked = PromptFields(**fields, examples=[EXAMPLE])
    with pytest.raises(InvalidRequestError) as caught:
        choose_prompt(Defaults("", family=BGE_EN_ICL), asked)
    assert caught.value.param == "examples"


@pytest.mark.parametrize(
    ("examples", "param", "word"),
    [
        ("x", "examples", "list"),
        (["x"], "examples[0]", "an object is needed"),
        ([{"instruct": "a", "query": "b"}], "examples[0].response", "must provide"),
        ([{"instruction": "a", "query": 5, "response": ""}], "examples[0].query", "string"),
        ([{"instruction": "a", "query": "b", "response": "c"}] * 65, "examples", "64"),
    ],
)
def test_examples_that_are_none(examples: object, param: str, word: str) -> None:
    with pytest.raises(InvalidRequestError, match=word) as caught:
        parsing.parse_fields(
            schemas.EmbeddingsRequest, {"model": "m", "input": "a", "examples": examples}
        )
    assert caught.value.param == param


def test_the_prompts_of_a_models_own_files() -> None:
    own = {"web_search_query": "Instruct: Search\nQuery: "}
    defaults = Defaults("", family=E5_MISTRAL, prompts=own)
    for fields in ({"task": "web_search_query"}, {"input_type": "web_search_query"}):
        assert prefix(defaults, **fields) == "Instruct: Search\nQuery: "
    with pytest.raises(InvalidRequestError, match="web_search_query"):
        prefix(defaults, input_type="other")


# Answers and errors


def test_an_answers_body() -> None:
    rows = [np.array([0.6, 0.8, 0.0], dtype=np.float32), np.array([0, 0, 1], dtype=np.float32)]
    floats, encoded = (
        json.loads(serialize.embeddings_body(rows, model="m", tokens=7, how=how))
        for how in (VectorFormat(), VectorFormat(base64=True))
    )
    assert floats["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [item["index"] for item in floats["data"]] == [0, 1]
    for row, item, text in zip(rows, floats["data"], encoded["data"], strict=True):
        np.testing.assert_array_equal(np.array(item["embedding"], dtype=np.float32), row)
        raw = base64.b64decode(text["embedding"], validate=True)
        assert raw == row.astype("<f4").tobytes()


def test_cut_vectors_have_length_one() -> None:
    half = cut(np.array([0.6, 0.0, 0.8], dtype=np.float32), 2)
    np.testing.assert_array_equal(half, [1, 0])
    assert cut(np.array([0, 1], dtype=np.float32), 1).tolist() == [0]


def all_errors(base: type[ServerError]) -> list[type[ServerError]]:
    return [base] + [error for sub in base.__subclasses__() for error in all_errors(sub)]


@pytest.mark.parametrize("error", all_errors(ServerError))
def test_every_error_has_a_status_and_the_envelope(error: type[ServerError]) -> None:
    one = error("what happened", param="input[3]", retry_after=5)
    assert 400 <= one.status <= 504
    assert error_body(one)["error"].keys() == {"message", "type", "param", "code"}
    assert json.dumps(error_body(one))


@pytest.mark.parametrize(("seconds", "shown"), [(0.01, "1"), (2.2, "3"), (900, "60")])
def test_retry_after_is_between_1_and_60_seconds(seconds: float, shown: str) -> None:
    headers = OverloadedError("full", retry_after=seconds).headers()
    assert headers["retry-after"] == shown
    assert 1000 <= int(headers["retry-after-ms"]) <= 60_000


def test_int8_refuses_a_vector_that_it_cannot_hold() -> None:
    """Two numbers beyond the largest are cut to the same: another direction."""
    tall = np.zeros(4096, dtype=np.float32)
    tall[:2] = np.sqrt([0.9, 0.1])
    usual = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    usual /= np.linalg.norm(usual)
    one = np.eye(4096, dtype=np.float32)[0]
    for dtype in ("int8", "uint8"):
        VectorFormat(dtype).check_vectors([usual, one])
        with pytest.raises(InvalidRequestError, match=r"input\[1\] .* cannot hold \(cosine 0.8"):
            VectorFormat(dtype).check_vectors([usual, tall])
    VectorFormat("float16").check_vectors([tall])


def test_dimensions_that_a_model_was_trained_for_need_no_flag() -> None:
    for wanted in (None, 256, 128, 64):
        VectorFormat(dimensions=wanted).check(256, allow_fewer=False, trained=(128, 64))
    with pytest.raises(InvalidRequestError, match=r"has 256 or 128 or 64 dimensions, 32 cannot"):
        VectorFormat(dimensions=32).check(256, allow_fewer=False, trained=(128, 64))
    VectorFormat(dimensions=32).check(256, allow_fewer=True, trained=(128, 64))


def test_bits_fill_bytes() -> None:
    with pytest.raises(InvalidRequestError, match="12 dimensions do not fill bytes"):
        VectorFormat("binary", dimensions=12).check(64, allow_fewer=True)
    VectorFormat("ubinary", dimensions=16).check(64, allow_fewer=True)
