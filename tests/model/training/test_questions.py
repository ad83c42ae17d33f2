"""Converters of questions, country profiles, utterances and Perl's manual."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from model.training import questions
from model.training.examples import DataError

POD = """=head1 NAME

perlfaq4 - Data Manipulation of all the kinds that people ask about

=head2 Why is C<int()> broken?

Your C<int()> is most probably working just fine. It's the B<numbers I<that>> aren't quite what you
think. See L<perlop/"Arithmetic"> and L<the manual|perlnumber> for the whole of the story.

    print int(0.6/0.2-2), "\\n";

=over 4

=back

A further paragraph of prose under the same heading, long enough to be kept as one.
"""


def test_pages_of_perls_manual(tmp_path: Path) -> None:
    (tmp_path / "perlfaq4.pod").write_text(POD)
    name, section = questions.pod_sections(tmp_path / "perlfaq4.pod")
    assert name.heading == "NAME"
    assert (section.title, section.heading) == ("perlfaq4", "Why is int() broken?")
    first, second = section.paragraphs
    assert first.startswith("Your int() is most probably working just fine. It's the numbers that")
    assert first.endswith('See perlop/"Arithmetic" and perlnumber for the whole of the story.')
    assert second.startswith("A further paragraph")


def test_questions_of_perls_faq_are_asked_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "perl-doc/usr/share/perl/5.36.0/pod"
    folder.mkdir(parents=True)
    (folder / "perlfaq4.pod").write_text(POD)
    (folder / "perl5360delta.pod").write_text(POD)  # a list of changes
    pairs = list(questions.question_pairs(tmp_path, tmp_path, random.Random(1)))
    asked = [pair for pair in pairs if pair.query == "Why is int() broken?"]
    assert [pair.task for pair in asked] == [questions.TASK_QUESTION]


@pytest.mark.parametrize(
    ("question", "query", "topic"),
    [
        ("What is (are) Michels syndrome ?", "What is Michels syndrome?", "Michels syndrome"),
        ("Is Gout inherited ?", "Is Gout inherited?", "Gout"),
        ("What are the symptoms of Gout ?", "What are the symptoms of Gout?", "Gout"),
        ("Who is at risk for Gout? ?", "Who is at risk for Gout?", "Gout"),
        ("What are the genetic changes related to Gout ?", None, "Gout"),
        ("what research (or clinical trials) is being done for Gout ?", None, "Gout"),
        ("How are teeth cleaned?", None, "How are teeth cleaned?"),
    ],
)
def test_health_questions_know_their_topic(
    question: str, query: str | None, topic: str, tmp_path: Path
) -> None:
    with gzip.open(tmp_path / "medquad.jsonl.gz", "wt") as file:
        file.write(json.dumps({"question": question, "answer": "An  answer."}) + "\n")
    (row,) = questions.health_rows(tmp_path)
    assert (row.group, row.passage) == (topic, "An answer.")
    assert query is None or row.query == query


def test_countries_and_their_topics(tmp_path: Path) -> None:
    rows = [
        {"country": "Peru", "field": "Geography: Location", "text": "Western South America"},
        {"country": "Peru", "field": "Economy: GDP: growth", "text": "Some"},
        {"country": "xo", "field": "Geography: Location", "text": "body of water"},
    ]
    with gzip.open(tmp_path / "factbook.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = list(questions.country_rows(tmp_path))
    assert [row.query for row in found] == ["Peru, location", "Peru, GDP: growth"]
    assert {row.group for row in found} == {"Peru"}


def test_an_unusable_file_is_named(tmp_path: Path) -> None:
    assert list(questions.health_rows(tmp_path)) == []  # absent: left out
    path = tmp_path / "medquad.jsonl.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"medquad\.jsonl\.gz cannot be read"):
        list(questions.health_rows(tmp_path))
    with gzip.open(path, "wt") as file:
        file.write('{"question": "what?"}\n')
    with pytest.raises(DataError, match="line 1: not question, answer"):
        list(questions.health_rows(tmp_path))


def test_fresh_texts_stand_among_as_many_old_ones() -> None:
    old = [f"old {i}" for i in range(10)]
    texts = questions.mixed(["new 1", "old 7", "new 2", "new 3"], old, random.Random(1))
    assert sorted(texts) == sorted([*old, "new 1", "new 2", "new 3"])
    assert sorted(texts[:6]) == ["new 1", "new 2", "new 3", "old 0", "old 1", "old 2"]
    assert texts[6:] == old[3:]
