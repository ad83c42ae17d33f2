"""The grammar of captions: what it writes is a sentence, and no two are alike."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from model.training import captions


def test_sentences_are_well_formed() -> None:
    texts = captions.captions(4_000, random.Random(3))
    assert len(set(texts)) == 4_000
    for text in texts:
        assert re.fullmatch(r"[A-Z][A-Za-z ,-]+\.?", text), text
        assert "  " not in text
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [^aeiou]", text), text
        assert not re.search(r"\b(Two|Three|Four|Five|Many|Several) .* is not\b", text), text


@pytest.mark.parametrize("form", [" being ", " not ", "There is no ", " and "])
def test_each_form_is_there(form: str) -> None:
    texts = captions.captions(1_000, random.Random(4))
    assert sum(form in text for text in texts) >= 10


def test_the_command_writes_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "captions.jsonl"
    monkeypatch.setattr("sys.argv", ["captions", str(out), "--most", "30"])
    captions.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 30
    assert all(row["source"] == "captions" for row in rows)
