"""The data format, and what a bad line says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from model.training.examples import (
    DataError,
    Example,
    ScoredPair,
    read_examples,
    read_scored,
    read_texts,
    write_examples,
)

GOOD = {"query": "q", "positive": "p"}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    examples = [Example("q", "p", ("n", "m"), "a task", True), Example("ü", "p")]
    write_examples(tmp_path / "x.jsonl", examples)
    assert read_examples(tmp_path / "x.jsonl") == examples


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        (json.dumps({"query": "q"}), "positive is missing"),
        (json.dumps({"query": " ", "positive": "p"}), "query is empty"),
        (json.dumps({"query": 5, "positive": "p"}), "query is not a text"),
        (json.dumps({**GOOD, "negatives": "n"}), "negatives is not a list of texts"),
        (json.dumps({**GOOD, "negatives": [""]}), "negatives is not a list of texts"),
        (json.dumps({**GOOD, "task": 1}), "task is not a text"),
        (json.dumps({**GOOD, "symmetric": "yes"}), "symmetric is not true or false"),
        (json.dumps({**GOOD, "neg": ["n"]}), "unknown key 'neg'; did you mean negatives"),
        (json.dumps({**GOOD, "negative": ["n"]}), "unknown key 'negative'; did you mean negatives"),
        (json.dumps({**GOOD, "Task": "t"}), "unknown key 'Task'; did you mean task"),
        (json.dumps({**GOOD, "x": 1}), "unknown key 'x'. Known: query, positive, negatives, task,"),
        (json.dumps({**GOOD, "negatives": ""}), "negatives is not a list of texts"),
        (json.dumps({**GOOD, "task": []}), "task is not a text"),
        ("[" * 100_000, "nested too deeply"),
        ('{"query": "q", "query": "r", "positive": "p"}', "not JSON (it has 'query' twice)"),
        (json.dumps({**GOOD, "query": "\ud83d"}), "half of a surrogate pair"),
        (json.dumps({**GOOD, "negatives": ["n", "\udc00"]}), "half of a surrogate pair"),
        (json.dumps({**GOOD, "meta": {"\ud800": 1}}), "half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match=re.escape(f"x.jsonl, line 2: {reason}")):
        read_examples(file)


SCORED = {"first": "a", "second": "b", "score": 2.5}


def test_scored_pairs(tmp_path: Path) -> None:
    lines = [json.dumps(SCORED), json.dumps({**SCORED, "score": 0, "task": "t", "source": "s"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    pairs = [ScoredPair("a", "b", 2.5), ScoredPair("a", "b", 0.0, "t")]
    assert read_scored(tmp_path / "x.jsonl") == pairs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score": None}, "score is missing"),
        ({"score": "3"}, "score is not a number"),
        ({"score": True}, "score is not a number"),
        ({"score": float("nan")}, r"score is no number up to 1e\+09"),
        ({"score": 10**400}, "score is no number up to"),
        ({"second": ""}, "second is empty"),
        ({"first": 1}, "first is not a text"),
        ({"task": 1}, "task is not a text"),
        ({"scores": 1}, "unknown key 'scores'; did you mean score"),
    ],
)
def test_a_bad_scored_pair_is_named(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(SCORED) + "\n" + json.dumps(SCORED | changes) + "\n")
    with pytest.raises(DataError, match=f"{path}, line 2: {reason}"):
        read_scored(path)


def test_blank_lines_at_the_end_are_none(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for end in ("", "\n", "\n\n", "\r\n\r\n", "\n \n", "\n\t"):
        file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}{end}", newline="")
        assert read_examples(file) == [Example("q", "p")] * 2
    file.write_text(f"{json.dumps(GOOD)}\n\n{json.dumps(GOOD)}\n")
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_examples(file)
    file.write_text("\n\n")
    assert read_examples(file) == []


def test_a_whole_emoji_is_no_half(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({**GOOD, "query": "\U0001f600"}) + "\n")
    assert read_examples(file)[0].query == "\U0001f600"


def test_what_a_line_says_of_itself_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    about = {"id": 7, "_id": "a", "source": "s", "meta": {"neg": 1}, "metadata": None}
    file.write_text("\ufeff" + json.dumps(GOOD | about) + "\n")
    assert read_examples(file) == [Example("q", "p")]


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a", "source": "s"}\n{"source": "s"}\n')
    with pytest.raises(DataError, match="line 2: text is missing"):
        read_texts(file)
    file.write_text('{"text": "a", "vector": []}\n')
    with pytest.raises(DataError, match=r"line 1: unknown key 'vector'\. Known: text; ignored: id"):
        read_texts(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_texts(tmp_path / "absent.jsonl")
