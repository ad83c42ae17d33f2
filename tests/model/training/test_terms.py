"""Questions about rare terms: what a term is, and what is asked."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from model.training import terms
from model.training.sources import TASK_QUESTION

COMMON = "the tool reads a file and writes what it finds in the file to another file again"
SEEN = Counter(dict.fromkeys(COMMON.split(), terms.RARE + 1))


@pytest.mark.parametrize(
    ("passage", "found"),
    [
        ("the tool reads zeugma and writes", ["zeugma"]),
        ("the Zeugma File reads", ["Zeugma"]),
        ("what it finds, qua QUB Format-7 in the file", ["qua QUB Format-7"]),
        ("alpha beta gamma delta the file", ["alpha beta gamma", "delta"]),
        ("zeugma, qua the tool", ["zeugma", "qua"]),  # a comma parts them
        ("a q file reads py_build.c and c++ again", ["py_build.c", "c++"]),
        ("zeugma the zeugma", ["zeugma"]),
        ("zeugma qua the zeugma", ["zeugma qua", "zeugma"]),
        ("the tool reads a file", []),
    ],
)
def test_terms_are_runs_of_rare_words(passage: str, found: list[str]) -> None:
    assert terms.terms(passage, SEEN) == found


def test_a_word_is_counted_once_a_passage() -> None:
    counted = terms.document_frequency(["Ant ant bee", "an ANT, there"])
    assert counted["ant"] == 2
    assert counted["bee"] == 1


def test_each_form_is_asked() -> None:
    passages = {f"term{n}a of the file and term{n}b": "docs" for n in range(400)}
    passages |= dict.fromkeys(["the of file and", "file of the and"], "docs")
    pairs = list(terms.term_pairs(passages, random.Random(1)))
    assert len(pairs) == 400  # none of a passage without a rare word
    asked = [pair for pair in pairs if pair.task == TASK_QUESTION]
    both = [p for p in pairs if p.task == terms.TASK_KEYWORDS and " " in p.query]
    assert 150 < len(asked) < 250
    assert 60 < len(both) < 140
    assert all(pair.query.startswith("what is term") for pair in asked)
    assert all(part in pair.positive for pair in both for part in pair.query.split())


def test_the_command_reads_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"query": "q", "task": "t", "symmetric": False}
    filler = f"{COMMON} "
    for name in ("pairs", "pairs2"):
        rows = [
            {**row, "positive": f"{filler}{name} number{n}", "source": "docs"}
            for n in range(terms.RARE + 5)
        ]
        rows += [{**row, "positive": "zeugma", "source": "docs"}]  # too short
        rows += [{**row, "positive": f"{filler} zeugma", "source": terms.UNNAMED[0]}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr("sys.argv", ["terms", str(tmp_path), "--most", "50"])
    terms.main()
    pairs = [json.loads(line) for line in (tmp_path / "pairs3.jsonl").read_text().splitlines()]
    assert len(pairs) == 50
    read = {name for pair in pairs for name in ("pairs ", "pairs2 ") if name in pair["positive"]}
    assert read == {"pairs ", "pairs2 "}
    assert all("number" in pair["query"] for pair in pairs)
