"""Overlap with evaluation texts is found and taken out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from model.training.decontamination import Evaluated, main

LONG = "one two three four five six seven eight nine ten eleven twelve"


def test_a_shared_run_of_words_is_an_overlap() -> None:
    known = Evaluated([LONG, "Two words", "..."], n=10)
    assert known.overlaps("x Three, four five six seven EIGHT nine ten eleven twelve y")
    assert not known.overlaps("three four five six seven eight nine ten eleven, thirteen")
    assert known.overlaps("two words!")
    assert not known.overlaps("two words more")
    assert not known.overlaps("!!!")


def test_the_command_writes_what_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, sts, csv = tmp_path / "t.jsonl", tmp_path / "sts.csv", tmp_path / "c.csv"
    rows = [
        {"query": "a", "positive": "fine"},
        {"query": "b", "positive": "p", "negatives": ["A test row"]},
        {"text": LONG},
        {"first": "other", "second": "c", "score": 1},
        {"first": "c", "second": LONG, "score": 1},
    ]
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sts.write_text(f"g\tf\ty\ti\t3\t{LONG}\tother\n")
    csv.write_text("text,category,split\na test row,x,test\na,x,train\n")
    out = tmp_path / "clean.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", str(train), str(sts), str(csv), "-o", str(out)])
    main()
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows[:1]
    assert "1 lines overlap" in capsys.readouterr().out
