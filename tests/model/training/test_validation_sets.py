"""The validation set from a small tree of unpacked packages."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from model.training import evaluation, validation_sets
from model.training.examples import DataError
from model.training.validation_sets import FOLDOC, Row, build, chosen

BODY = (
    "This is a passage of some length which says {0}, and goes on to say {0} once more, at length."
)
FILES = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")


def write_tree(root: Path) -> Path:
    dictionary = root / FOLDOC
    dictionary.parent.mkdir(parents=True)
    entries = [("frob", "   <jargon> " + BODY.format("how things are {fiddled} with"))]
    entries += [("passage", "   " + BODY.format("its own word at once"))]  # left out
    entries += [("short", "   Too short.")]
    text = "".join(f"{word}\n\n{body}\n" for word, body in entries)
    dictionary.write_bytes(gzip.compress(text.encode()))
    for path, heading in (
        ("debian-handbook/usr/share/doc/debian-handbook/html/en-US/a.html", "How to start"),
        ("debian-handbook/usr/share/doc/debian-handbook/html/de-DE/a.html", "Wie man beginnt"),
        ("debian-reference-en/usr/share/debian-reference/ch01.en.html", "The shell prompt"),
    ):
        page = root / path
        page.parent.mkdir(parents=True)
        more = (BODY.format("more") + " ") * 5
        page.write_text(f"<h1>{heading}</h1><p>{BODY.format(heading)}</p><p>{more}</p>")
    return root


def test_words_and_headings_ask_for_their_passages(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "debian")
    queries, passages = build(root, tmp_path / "out")
    data = evaluation.read_retrieval(tmp_path / "out")
    assert sorted(data.queries) == ["How to start", "The shell prompt", "what is frob?"]
    assert (len(data.queries), len(data.documents)) == (queries, passages)
    assert passages > queries  # the passages further down are there without a query
    for query, relevant in zip(data.queries, data.relevant, strict=True):
        (place,) = relevant
        said = {"what is frob?": "how things are fiddled with"}.get(query, query)
        assert f"says {said}" in data.documents[place]


def test_the_same_packages_give_the_same_files(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "debian")
    build(root, tmp_path / "first")
    build(root, tmp_path / "second")
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_rows_are_chosen_by_their_hash_and_have_one_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation_sets, "QUERIES", 3)
    monkeypatch.setattr(validation_sets, "PASSAGES", 5)
    rows = [Row(f"passage {i}", f"query {i}") for i in range(20)]
    found = chosen(rows)
    assert chosen(rows[::-1]) == found
    assert (len(found), sum(bool(row.query) for row in found)) == (5, 3)
    smallest = sorted(rows, key=lambda row: row.id)[:5]
    assert {row.passage for row in found} == {row.passage for row in smallest}
    twice = [Row("one", "Notes"), Row("two", "notes"), Row("three", "A"), Row("three", "B")]
    assert chosen([*twice, Row("four", "C")]) == [Row("four", "C")]


def test_a_package_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"foldoc\.dict\.dz cannot be read"):
        build(tmp_path, tmp_path / "out")
