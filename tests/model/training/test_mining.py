"""Mining, and the converters' rules of which rows may be used."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.families import Side
from model.training.examples import DataError, Example
from model.training.mining import below, hard_negatives, mine
from model.training.sources import (
    MANUALS,
    ScoredPair,
    banking_rows,
    is_development,
    manual_pairs,
    package_descriptions,
    sts_rows,
    synsets,
)
from model.training.stages import Known, class_examples, sts_examples, with_texts_of
from server import cli


def test_negatives_stay_below_the_threshold() -> None:
    scores = np.array([0.8, 0.99, 0.77, 0.75, 0.1, 0.3])
    most = below(0.8, 0.95)
    assert most == pytest.approx(0.76)
    assert hard_negatives(scores, most, count=2) == [3, 5]
    assert hard_negatives(scores, most, count=9) == [3, 5, 4]
    assert hard_negatives(scores, below(0.1, 0.95), count=2) == []
    assert below(-0.2, 0.95) == pytest.approx(-0.21)  # below it, for a negative score too


def test_mining_gives_each_query_the_nearest_others() -> None:
    angles = {"q": 0.0, "p": 0.3, "near": 0.5, "far": 2.0, "nearer": 0.31}

    def embed(texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
        asked.append((side, task))
        found = [angles[text] for text in texts]
        return np.array([[np.cos(a), np.sin(a)] for a in found], dtype=np.float32)

    asked: list[tuple[Side, str]] = []
    rows = [("q", "p"), ("near", "near"), ("far", "far"), ("nearer", "nearer"), ("q", "far")]
    mined = list(mine([Example(q, p, task="t") for q, p in rows], embed, count=2))
    # "nearer" scores 0.952 against the positive's 0.955: too close to be a sure negative. "far"
    # is another positive of the same query.
    assert mined[0].negatives == ("near",)
    assert all(example.query not in example.negatives for example in mined)
    assert asked == [("passage", ""), ("query", "t")]


def test_passages_are_asked_as_in_training() -> None:
    """Symmetric ones as queries with their task, and only against others of their kind."""
    asked: list[tuple[tuple[str, ...], Side, str]] = []

    def embed(texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
        asked.append((tuple(texts), side, task))
        turned = {"passage": 0.0, "query": 0.1}[side] + len(task)
        angles = [turned + 0.5 * int(text[1]) + 0.01 * (text[0] == "q") for text in texts]
        return np.array([[np.cos(a), np.sin(a)] for a in angles], dtype=np.float32)

    kinds = [("", False), ("sts", True), ("", False), ("clusters", True), ("sts", True)]
    kinds += [("clusters", True), ("", False)]
    examples = [
        Example(f"q{n}", f"p{n}", task=task, symmetric=symmetric)
        for n, (task, symmetric) in enumerate(kinds)
    ]
    examples += [Example("q1", "p0"), Example("q6", "p1", task="sts", symmetric=True)]
    mined = list(mine(examples, embed, count=4))
    assert [replace(example, negatives=()) for example in mined] == examples
    assert [example.negatives for example in mined] == [
        ("p2", "p6"), ("p4",), ("p0", "p6"), ("p5",), ("p1",), ("p3",), ("p2", "p0"),
        ("p6",), (),
    ]  # fmt: skip
    passages = [call for call in asked if call[0][0][0] == "p"]
    assert passages == [
        (("p0", "p2", "p6"), "passage", ""),
        (("p1", "p4"), "query", "sts"),
        (("p3", "p5"), "query", "clusters"),
    ]


def test_the_command_stops_at_a_bad_line_and_says_how_many_were_mined(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "pairs.jsonl", tmp_path / "mined.jsonl"
    call = ["mine", str(source), "-o", str(out), "--model", str(tiny_checkpoint), "--threads", "1"]
    source.write_text('{"query": "a", "positive": "b"}\n{"query": "a"}\n')
    assert cli.main(call) == 2
    assert "pairs.jsonl, line 2: positive is missing" in capsys.readouterr().err
    assert not out.exists()
    rows = [{"query": f"is {word} here?", "positive": word} for word in ("a cat", "a dog", "tea")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main([*call, "--count", "0"]) == 2
    assert "--count: must be at least 1, not 0" in capsys.readouterr().err
    assert cli.main([*call, "--count", "3"]) == 0
    assert "3 of them have fewer than 3 negatives" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 3
    call[3] = str(tmp_path / "absent" / "mined.jsonl")
    assert cli.main(call) == 2
    assert "mined.jsonl cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pairs.jsonl", "soft", "hard", "./x/../pairs.jsonl"])
def test_the_examples_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"query": "a", "positive": "b"}\n')
    (tmp_path / "x").mkdir()
    (tmp_path / "soft").symlink_to(source)
    (tmp_path / "hard").hardlink_to(source)
    assert cli.main(["mine", str(source), "-o", f"{tmp_path}/{name}", "--model", "/absent"]) == 2
    assert "which is read: name another output" in capsys.readouterr().err
    assert source.read_text() == '{"query": "a", "positive": "b"}\n'
    assert os.path.samefile(tmp_path / "soft", tmp_path / "hard")


def test_an_output_that_can_be_no_file_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root a file that is moved there takes the place of /dev/null."""
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"query": "a", "positive": "b"}\n')
    os.mkfifo(tmp_path / "fifo")
    for name, kind in (("/dev/null", "a device"), (".", "a folder"), ("fifo", "a pipe (FIFO)")):
        out = str(tmp_path / name)
        assert cli.main(["mine", str(source), "-o", out, "--model", "/absent"]) == 2
        assert f"{tmp_path / name} is {kind}" in capsys.readouterr().err


def test_mined_texts_are_as_private_as_the_examples(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source, out, other = (tmp_path / name for name in ("p.jsonl", "out.jsonl", "out.jsonl.part"))
    source.write_text('{"query": "a", "positive": "b"}\n')
    source.chmod(0o600)
    other.write_text("somebody's")
    assert cli.main(["mine", str(source), "-o", str(out), "--model", str(tiny_checkpoint)]) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    assert other.read_text() == "somebody's"
    assert sorted(tmp_path.iterdir()) == sorted([source, out, other])


def test_sts_leaves_out_what_is_not_free(tmp_path: Path) -> None:
    file = tmp_path / "sts.csv"
    names = ("MSRvid", "MSRpar", "headlines", "deft-forum", "deft-news", "images")
    file.write_text("".join(f"g\t{name}\t2012\t1\t4.5\tin {name}\tb\n" for name in names))
    assert [row.first for row in sts_rows(file)] == ["in MSRvid", "in images"]


def test_banking_development_rows_are_kept_apart(tmp_path: Path) -> None:
    texts = [f"question, number {i}" for i in range(50)]
    file = tmp_path / "train.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([("text", "category"), *((text, "x") for text in texts)])
    development = [text for text, _ in banking_rows(file, development=True)]
    assert development == [text for text in texts if is_development(text)]
    assert 0 < len(development) < 25
    rest = [text for text, _ in banking_rows(file, development=False)]
    assert sorted(development + rest) == sorted(texts)


def test_examples_of_the_labelled_sets() -> None:
    rng = np.random.default_rng(1)
    rows = [(f"{label} {i}", label) for label in "abcdefgh" for i in range(5)]
    known = Known([text for text, _ in rows], rng.standard_normal((40, 6)))
    found = class_examples(rows, known, "Find the class", random.Random(1))
    assert len(found) == 40
    for example in found:
        label = example.query[0]
        assert example.positive[0] == label
        assert example.positive != example.query
        assert len(example.negatives) == 7
        assert not any(text.startswith(label) for text in example.negatives)
        assert (example.symmetric, example.task) == (True, "Find the class")

    # Few classes and rows, one of them without a mate: as many negatives as there are.
    few = class_examples([rows[0], rows[1], rows[5]], known, "", random.Random(1))  # a 0, a 1, b 0
    assert [(e.query, e.positive, e.negatives) for e in few] == [
        ("a 0", "a 1", ("b 0",)),
        ("a 1", "a 0", ("b 0",)),
    ]
    with pytest.raises(DataError, match="two labels or more"):
        class_examples(rows[:5], known, "", random.Random(1))

    pairs = [ScoredPair("s0", "s1", 4.0), ScoredPair("s0", "s2", 3.5), ScoredPair("s3", "s4", 1.0)]
    sentences = [f"s{i}" for i in range(5)]
    vectors = rng.standard_normal((5, 6))
    vectors[1] = vectors[0] + 0.01
    both = sts_examples(pairs, Known(sentences, vectors))
    assert [(e.query, e.positive) for e in both] == [("s0", "s1"), ("s1", "s0")]
    assert not set(both[0].negatives) & {"s0", "s1", "s2"}  # s2 is too like s0


def test_wordnet_lines(tmp_path: Path) -> None:
    folder = tmp_path / "wordnet-base/usr/share/wordnet"
    folder.mkdir(parents=True)
    line = (
        "00006269 03 n 02 life 0 living_thing(p) 1 002 @ 00004258 n 0000 ~ 07993776 n 0000 | "
        'living things collectively; "the oceans are teeming with life"'
    )
    (folder / "data.noun").write_text("  1 a licence line\n" + line + "  \n")
    for part in ("verb", "adj", "adv"):
        (folder / f"data.{part}").write_text("")
    (found,) = synsets(tmp_path)
    assert found.words == ("life", "living thing")
    assert found.gloss == "living things collectively"
    assert found.examples == ("the oceans are teeming with life",)


def test_package_descriptions(tmp_path: Path) -> None:
    file = tmp_path / "Translation-en"
    file.write_text(
        "Package: tool\nDescription-md5: 0\nDescription-en: small tool\n It does a thing and\n"
        " another.\n .\n  * a list\n .\n And more things.\n\nPackage: bare\n\n"
    )
    expected = ("tool", "small tool", "It does a thing and another. And more things.")
    assert list(package_descriptions(file)) == [expected]


def test_pages_become_headings_and_passages(tmp_path: Path) -> None:
    folder = tmp_path / "sqlite3-doc/usr/share/doc/sqlite3"
    folder.mkdir(parents=True)
    text = "Rows are kept in pages, and pages are kept in one single file on a disk. "
    (folder / "a.html").write_text(
        f"<title>no</title><nav>menu menu</nav><h1>1. The File Format¶</h1><p>{text}"
        f"<pre>code();</pre>{text}</p><script>x</script><h2>Pages of it</h2><p>{text}{text}</p>"
    )
    pairs = list(manual_pairs(tmp_path, "sqlite3-doc", random.Random(0)))
    assert [pair.query for pair in pairs] == ["The File Format", "The File Format: Pages of it"]
    assert pairs[0].positive.startswith("Rows are kept")
    assert "code" not in pairs[0].positive


def test_the_pandas_cookbook_is_left_out() -> None:
    """Its text is CC BY-SA upstream."""
    pages = [f"html/user_guide/{name}.html" for name in ("cookbook", "categorical", "io")]
    globs = MANUALS["python-pandas-doc"]
    folder = Path("usr/share/doc/python-pandas-doc")
    found = [page for page in pages if any((folder / page).match(glob) for glob in globs)]
    assert found == pages[1:]


def test_what_pairs_have_and_the_texts_lack_is_embedded_once() -> None:
    asked: list[list[str]] = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    examples = [Example("q", "known"), Example("other", "q"), Example("known", "known")]
    texts, vectors = with_texts_of(examples, ["known"], np.array([[9.0, 9.0]]), encode)
    assert asked == [["q", "other"]]
    assert texts == ["known", "q", "other"]
    assert vectors.tolist() == [[9, 9], [1, 1], [5, 1]]
    assert with_texts_of(examples, texts, vectors, encode)[0] == texts
    assert len(asked) == 1
