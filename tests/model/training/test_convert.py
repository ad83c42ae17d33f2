"""One's own labelled or scored file becomes training lines. The teacher counts letters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.training import convert
from model.training.examples import is_held_out, read_examples


class Letters:
    def __init__(self, folder: str | None) -> None:
        assert folder in (None, "folder")

    def encode(self, texts: Sequence[str], *, progress: bool) -> NDArray[np.float32]:
        assert len(set(texts)) == len(texts)
        counts = [[text.count(chr(97 + i)) for i in range(26)] for text in texts]
        return np.array(counts, dtype=np.float32) + 0.01


@pytest.fixture(autouse=True)
def _teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "Teacher", Letters)


def test_a_labelled_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "data.csv", tmp_path / "out.jsonl"
    rows = ["cat,pet,train", "a cat,pet,train", "tea,drink,train", "a tea,drink,train"]
    source.write_text("\n".join(["text,label,split", *rows, "the cat,pet,test"]))
    call = ["labelled", str(source), "--task", "Find the kind", "-o", str(out)]
    assert convert.main(call) == 0
    assert "4 examples" in capsys.readouterr().out
    examples = read_examples(out)
    assert [e.query for e in examples] == ["cat", "a cat", "tea", "a tea"]  # no test rows
    assert (examples[0].positive, set(examples[0].negatives)) == ("a cat", {"tea", "a tea"})
    assert all(e.task == "Find the kind" and e.symmetric for e in examples)
    assert convert.main([*call, "--all", "--teacher", "folder"]) == 0
    assert len(read_examples(out)) == 5
    assert convert.main([*call[:3], "banking77", *call[4:]]) == 0
    assert read_examples(out)[0].task.startswith("Given a online banking query")


def test_a_labelled_csv_by_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "data.csv", tmp_path / "out.jsonl"
    held_out = next(label for label in map("kind_{}".format, range(999)) if held(label))
    rows = ["cat,house_pet", "tea,hot-drink", "hot drink,hot-drink", "cat,small_thing", "-7,-1"]
    source.write_text("\n".join(["text,label", *rows, f"dog,{held_out}"]))
    call = ["labelled", str(source), "--task", "Find the kind", "-o", str(out), "--all"]
    assert convert.main([*call, "--by", "label"]) == 0
    assert "5 examples" in capsys.readouterr().out  # "hot drink" is its label
    examples = read_examples(out)
    texts = {"house pet", "hot drink", "small thing", "-1", f"{held_out.replace('_', ' ')}."}
    found = {(e.query, e.positive): set(e.negatives) for e in examples}
    assert found["cat", "house pet"] == texts - {"house pet", "small thing"}  # both are its labels
    assert found["cat", "small thing"] == texts - {"house pet", "small thing"}
    assert found["tea", "hot drink"] == texts - {"hot drink"}
    assert found["-7", "-1"] == texts - {"-1"}
    assert not any(is_held_out(text) for text in texts)  # a class that is never learnt
    assert {(e.task, e.symmetric) for e in examples} == {("Find the kind", False)}
    with pytest.raises(SystemExit):
        convert.main([*call, "--by", "name"])
    assert "choose from" in capsys.readouterr().err


def held(label: str) -> bool:
    return is_held_out(label.replace("_", " "))


def test_scored_pairs(tmp_path: Path) -> None:
    source, out = tmp_path / "pairs.tsv", tmp_path / "out.jsonl"
    lines = [("4.5", "a cat", "the cat"), ("1", "a dog", "tea"), ("3", "a cat", "cat")]
    source.write_text("".join(f"g\tf\ty\ti\t{s}\t{a}\t{b}\n" for s, a, b in lines))
    assert convert.main(["sts", str(source), "-o", str(out)]) == 0
    first, second = read_examples(out)
    assert (first.query, first.positive) == (second.positive, second.query) == ("a cat", "the cat")
    assert "cat" not in first.negatives  # scored 3
    assert first.task == "Retrieve semantically similar text."


def test_a_bad_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "data.csv"
    call = ["labelled", str(source), "--task", "Find the kind", "-o", str(tmp_path / "out.jsonl")]
    assert convert.main(call) == 2
    assert "data.csv cannot be read" in capsys.readouterr().err
    source.write_text("text,label,split\na,x,train\nb,x,train\n")
    assert convert.main(call) == 2
    assert "two labels or more" in capsys.readouterr().err
    assert convert.main([*call, "--by", "label"]) == 2
    assert "two labels or more" in capsys.readouterr().err
