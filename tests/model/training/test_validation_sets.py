"""The validation sets from a small tree of unpacked packages and small files of questions."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from model.training import evaluation, questions, validation_sets
from model.training.examples import DataError
from model.training.validation_sets import FOLDOC, Row, build, chosen, overlapping

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
    help_pages = "libreoffice-help-en-us/usr/share/libreoffice/help/en-US/text"
    for path, heading in (
        ("debian-handbook/usr/share/doc/debian-handbook/html/en-US/a.html", "How to start"),
        ("debian-handbook/usr/share/doc/debian-handbook/html/de-DE/a.html", "Wie man beginnt"),
        ("debian-reference-en/usr/share/debian-reference/ch01.en.html", "The shell prompt"),
        (f"{help_pages}/swriter/a.html", "Writing letters"),
        (f"{help_pages}/sbasic/a.html", "Writing programs"),
    ):
        page = root / path
        page.parent.mkdir(parents=True)
        more = (BODY.format("more") + " ") * 5
        page.write_text(f"<h1>{heading}</h1><p>{BODY.format(heading)}</p><p>{more}</p>")
    return root


def kept_back(prefix: str, *, yes: bool = True) -> str:
    """A name that is for validation, or is not."""
    return next(
        name
        for name in (f"{prefix} {i}" for i in range(100))
        if questions.is_for_validation(name) is yes
    )


def write_questions(folder: Path) -> Path:
    folder.mkdir()
    files: dict[str, list[dict[str, str]]] = {"medquad": [], "factbook": [], "clinc150-train": []}
    for yes in (True, False):
        illness, country = kept_back("illness", yes=yes), kept_back("country", yes=yes)
        intent = kept_back("intent", yes=yes)
        files["medquad"] += [
            {"question": f"What is (are) {illness} ?", "answer": BODY.format("what ails")},
            {"question": f"What are the symptoms of {illness} ?", "answer": "Too short."},
        ]
        text = BODY.format(f"where {country} is, near the sea")
        files["factbook"] += [
            {"country": country, "field": "Geography: Location", "text": text},
        ]
        files["clinc150-train"] += [
            {"text": f"{intent}, said in the way of number {i}", "intent": intent} for i in range(6)
        ]
    for name, rows in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    return write_tree(tmp_path / "debian"), write_questions(tmp_path / "questions")


def asked(folder: Path) -> dict[str, list[str]]:
    """Query -> its passages."""
    data = evaluation.read_retrieval(folder)
    assert data.missing == 0
    return {
        query: [data.documents[place] for place in relevant]
        for query, relevant in zip(data.queries, data.relevant, strict=True)
    }


def test_words_headings_and_questions_ask_for_their_passages(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    made = build(*sources, tmp_path / "out", {})
    assert made.keys() == validation_sets.PARTS.keys()
    illness, country = kept_back("illness"), kept_back("country")
    expected = {
        "terms": {"what is frob?": "how things are fiddled with"},
        "health": {f"What is {illness}?": "what ails"},
        "office": {"Writing letters": "Writing letters"},
        "manuals": {"How to start": "How to start", "The shell prompt": "The shell prompt"},
        "countries": {f"{country}, location": f"where {country} is, near the sea"},
    }
    for part, queries in expected.items():
        found = asked(tmp_path / "out" / part)
        assert found.keys() == queries.keys(), part
        for query, said in queries.items():
            (passage,) = found[query]
            assert f"says {said}" in passage
        assert made[part]["queries"] == len(queries)
    # The passages further down a manual are there without a query.
    assert made["manuals"]["passages"] > made["manuals"]["queries"]


def test_utterances_ask_for_others_of_their_intent(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = validation_sets.PARTS["everyday"]
    few = validation_sets.Part(part.rows, queries=2, passages=9)
    monkeypatch.setitem(validation_sets.PARTS, "everyday", few)
    made = build(*sources, tmp_path / "out", {})
    found = asked(tmp_path / "out" / "everyday")
    assert (made["everyday"]["queries"], made["everyday"]["passages"]) == (2, 4)
    for query, passages in found.items():
        assert len(passages) == 4
        assert query not in passages  # it is no passage, too


def test_what_is_for_validation_is_in_no_training_data(sources: tuple[Path, Path]) -> None:
    import random

    debian, folder = sources
    rng = random.Random(1)
    trained = [text for text, _ in questions.single_texts(debian, folder, rng)]
    for pair in questions.question_pairs(debian, folder, rng):
        trained += [pair.query, pair.positive]
    assert kept_back("illness", yes=False) in " ".join(trained)
    for prefix in ("illness", "country", "intent"):
        name = kept_back(prefix)
        assert not any(f"{name}," in text or f"{name}?" in text for text in trained)


def test_the_same_packages_give_the_same_files(sources: tuple[Path, Path], tmp_path: Path) -> None:
    first = build(*sources, tmp_path / "first", {})
    assert build(*sources, tmp_path / "second", {}) == first
    for part in first:
        for name in FILES:
            one, two = (tmp_path / which / part / name for which in ("first", "second"))
            assert one.read_bytes() == two.read_bytes()


def test_rows_are_chosen_by_their_hash_and_have_one_answer() -> None:
    rows = [Row(f"passage {i}", f"query {i}") for i in range(20)]
    found = chosen(rows, 3, 5)
    assert chosen(rows[::-1], 3, 5) == found
    assert (len(found), sum(bool(row.query) for row in found)) == (5, 3)
    smallest = sorted(rows, key=lambda row: row.id)[:5]
    assert {row.passage for row in found} == {row.passage for row in smallest}
    twice = [Row("one", "Notes"), Row("two", "notes"), Row("three", "A"), Row("three", "B")]
    assert chosen([*twice, Row("four", "C")], 9, 9) == [Row("four", "C")]


def test_rows_that_overlap_with_training_texts() -> None:
    ten = "one two three four five six seven eight nine ten"
    same = Row(f"Before it {ten.upper()}, and more words behind it to be sure.", "numbers")
    nine = Row(f"Not quite: {ten[:-4]} eleven, and more words behind it to be sure.", "others")
    long_query = Row("A passage that nobody has read before, of ten words or more.", f"what {ten}?")
    heading = Row("Another passage that nobody has read before, of ten words.", "Installation")
    rows = [same, nine, long_query, heading]
    found = overlapping(rows, ["installation", f"he counts {ten} and stops"])
    assert found == {same.id, long_query.id}


def test_what_is_left_out_leaves_room_for_others(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = validation_sets.candidates(*sources)["manuals"]
    start = next(row for row in rows if row.query == "How to start")
    build(*sources, tmp_path / "out", {"manuals": [start.id]})
    assert asked(tmp_path / "out" / "manuals").keys() == {"The shell prompt"}
    documents = evaluation.read_retrieval(tmp_path / "out" / "manuals").documents
    assert start.passage not in documents


def test_absent_sources_leave_their_parts_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = build(write_tree(tmp_path / "debian"), None, tmp_path / "out", {})
    assert made.keys() == {"terms", "office", "manuals"}
    with pytest.raises(DataError, match="holds none of the packages"):
        build(tmp_path, None, tmp_path / "none", {})
    broken = tmp_path / "debian" / FOLDOC
    broken.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"foldoc\.dict\.dz cannot be read"):
        build(tmp_path / "debian", None, tmp_path / "out", {})


def test_another_set_than_the_recipes_is_said(
    sources: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(validation_sets, "RECIPE", tmp_path / "validation.json")
    debian, folder = sources
    training = tmp_path / "texts.jsonl"
    training.write_text(json.dumps({"text": BODY.format("how things are fiddled with")}))
    call = ["x", str(debian), str(tmp_path / "out"), "--questions", str(folder)]
    monkeypatch.setattr("sys.argv", [*call, "--choose", str(training)])
    assert validation_sets.main() == 0
    recipe = json.loads((tmp_path / "validation.json").read_text())
    assert len(recipe["left_out"]["terms"]) == 1
    assert recipe["sets"]["terms"]["queries"] == 0
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", call)
    assert validation_sets.main() == 0
    assert capsys.readouterr().err == ""
    page = debian / "debian-handbook/usr/share/doc/debian-handbook/html/en-US/a.html"
    page.write_text(page.read_text().replace("How to start", "How to begin"))
    assert validation_sets.main() == 0
    assert capsys.readouterr().err == (
        "validation_sets: manuals is not the set of the model card\n"
    )


def test_the_recipe_lists_what_the_card_was_measured_on() -> None:
    recipe = json.loads(validation_sets.RECIPE.read_text())
    assert recipe["sets"].keys() == validation_sets.PARTS.keys()
    assert sum(part["queries"] for part in recipe["sets"].values()) >= 1500
    assert all(recipe["sets"][name]["queries"] for name in recipe["left_out"])
