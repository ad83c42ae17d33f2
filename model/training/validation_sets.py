"""Retrieval sets to choose checkpoints by, so that the reporting sets stay unseen.

    python -m model.training.validation_sets DEBIAN OUT [--questions DIR] [--choose TRAINING]

DEBIAN holds the unpacked Debian packages dict-foldoc, debian-handbook, debian-reference-en and
libreoffice-help-en-us, one folder each (`apt-get download NAME`, `dpkg -x`); DIR holds the files
that `questions` describes. Neither these packages nor the diseases, countries and intents that
`questions` keeps back are in any training data. OUT gets a folder for each of PARTS, with
corpus.jsonl, queries.jsonl and qrels.tsv for `nv-embed evaluate --retrieval`.

Which rows stay is decided by their hash: a text's place does not depend on the others. What
shares ten words with training texts all the same (FOLDOC took over entries of the Jargon File) is
listed in recipes/validation.json, with the digest of each part; `--choose` makes that file anew.
The texts are under several licences (SOURCES.csv), FOLDOC's and Debian's under the GFDL and the
GPL: for measuring, not for training or redistribution.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import console
from model.errors import ModelError
from model.training.decontamination import NGRAM, ngrams
from model.training.examples import DataError, read_texts
from model.training.questions import (
    Asked,
    country_rows,
    health_rows,
    is_for_validation,
    utterances,
)
from model.training.sources import SHORT_PASSAGE, is_prose, manual_sections, passages, squeeze

RECIPE = Path(__file__).parent / "recipes" / "validation.json"
FOLDOC = "dict-foldoc/usr/share/dictd/foldoc.dict.dz"
MANUALS = {
    "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US/**/*.html",),
    "debian-reference-en": ("usr/share/**/*.en.html",),
}
OFFICE = {
    "libreoffice-help-en-us": tuple(
        f"usr/share/libreoffice/help/en-US/text/{part}/**/*.html"
        for part in ("shared", "swriter", "scalc", "simpress", "sdraw", "smath")
    )
}


@dataclass(frozen=True, slots=True)
class Row:
    """A passage, and the query it answers, or "" for a distractor."""

    passage: str
    query: str = ""
    label: str = ""
    """Where set, every passage of the same label answers the query, too."""

    @property
    def id(self) -> str:
        return hashlib.sha256(self.passage.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Part:
    """One set: its rows from unpacked packages and from the folder of questions, and its size."""

    rows: Callable[[Path, Path], Iterable[Row]]
    queries: int
    passages: int


def dictionary_rows(path: Path) -> Iterator[Row]:
    """FOLDOC's entries: the word as a question, the entry's first passage."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    for word, body in re.findall(r"(?m)^(\S[^\n]*)\n\n?((?:(?:[ ].*)?\n)+)", text):
        prose = [re.sub(r"[{}]", "", squeeze(part)) for part in re.split(r"\n\s*\n", body)]
        prose = [re.sub(r"^(<[^>]*>\s*)+", "", part) for part in prose]
        passage = next(passages((part for part in prose if len(part) > 60), SHORT_PASSAGE), "")
        # An entry that opens with its own word is found by the word alone.
        if len(passage) > 80 and word.lower() not in passage.lower()[:60]:
            yield Row(passage, f"what is {word}?")


def manual_rows(debian: Path, manuals: Mapping[str, tuple[str, ...]]) -> Iterator[Row]:
    """Headings with their first passage; the passages behind it without a query."""
    for package, patterns in manuals.items():
        for section in manual_sections(debian / package, patterns):
            for index, passage in enumerate(passages(section.paragraphs, SHORT_PASSAGE)):
                if len(passage) >= 60:
                    asked = index == 0 and is_prose(section.heading)
                    yield Row(passage, section.heading if asked else "")


def asked_rows(rows: Iterable[Asked]) -> Iterator[Row]:
    """Questions with the first passage of their answer, but for bare numbers and names."""
    for row in rows:
        passage = next(passages([row.passage], SHORT_PASSAGE), "")
        if row.for_validation and len(passage) >= 100:
            yield Row(passage, row.query)


def utterance_rows(questions: Path) -> Iterator[Row]:
    """Utterances of the intents kept back; those of the same intent answer one another."""
    for text, intent in utterances(questions):
        if is_for_validation(intent):
            yield Row(text, label=intent)


PARTS: dict[str, Part] = {
    # rare terms
    "terms": Part(lambda debian, _: dictionary_rows(debian / FOLDOC), 500, 1000),
    "health": Part(lambda _, questions: asked_rows(health_rows(questions)), 300, 800),
    # everyday language
    "everyday": Part(lambda _, questions: utterance_rows(questions), 400, 1500),
    "office": Part(lambda debian, _: manual_rows(debian, OFFICE), 300, 800),
    # neither
    "manuals": Part(lambda debian, _: manual_rows(debian, MANUALS), 400, 800),
    "countries": Part(lambda _, questions: asked_rows(country_rows(questions)), 250, 800),
}


def chosen(rows: Iterable[Row], queries: int, passages: int) -> list[Row]:
    """At most so many rows with a query, and so many in all, in the order of their hashes.

    A query or a passage that comes twice has no one right answer: it goes, wherever it stands.
    Rows with a label have many: the first of them become queries, and are no passages then.
    """
    every = list(dict.fromkeys(rows))
    passages_of: dict[str, set[str]] = {}
    queries_of: dict[str, set[str]] = {}
    for row in every:
        queries_of.setdefault(row.passage, set()).add(row.query or row.label)
        if row.query:
            passages_of.setdefault(row.query.lower(), set()).add(row.passage)
    unique = sorted(
        (
            row
            for row in every
            if len(queries_of[row.passage]) == 1
            and len(passages_of.get(row.query.lower(), ())) <= 1
        ),
        key=lambda row: row.id,
    )
    if any(row.label for row in unique):
        asking = [Row("", row.passage, row.label) for row in unique[:queries]]
        return asking + unique[queries : queries + passages]
    asked = [row for row in unique if row.query][:queries]
    rest = [row for row in unique if row not in set(asked)][: passages - len(asked)]
    return sorted(
        [*asked, *(Row(row.passage) for row in rest)],
        key=lambda row: row.id,
    )


def overlapping(rows: Iterable[Row], training: Iterable[str]) -> set[str]:
    """Ids of the rows whose passage or query shares NGRAM words with a training text.

    A shorter passage overlaps with its own copy; a shorter query with nothing, for a heading such
    as "Installation" stands in many manuals.
    """
    owners: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        grams = [*ngrams(row.passage), *(g for g in ngrams(row.query) if len(g) == NGRAM)]
        for gram in grams:
            owners.setdefault(gram, set()).add(row.id)
    found: set[str] = set()
    for text in training:
        for gram in ngrams(text):
            found |= owners.get(gram, set())
    return found


def write_part(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """Write one set. -> its numbers of queries and passages, and its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = [row for row in rows if row.passage]
    asking = [row for row in rows if row.query]
    names = {row: row.id if row.passage else Row(row.query).id for row in asking}
    judged = [
        (names[row], document.id)
        for row in asking
        for document in (documents if row.label else [row])
        if document.label == row.label
    ]
    files = {
        "corpus.jsonl": _lines((row.id, row.passage) for row in documents),
        "queries.jsonl": _lines((names[row], row.query) for row in asking),
        "qrels.tsv": "".join(f"{query}\t{document}\t1\n" for query, document in judged),
    }
    digest = hashlib.sha256()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        digest.update(text.encode())
    return {
        "queries": len(asking),
        "passages": len(documents),
        "sha256": digest.hexdigest(),
    }


def _lines(rows: Iterable[tuple[str, str]]) -> str:
    lines = (json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in rows)
    return "".join(f"{line}\n" for line in lines)


def build(
    debian: Path, questions: Path | None, out: Path, left_out: dict[str, list[str]]
) -> dict[str, dict[str, Any]]:
    """Write the parts whose sources are there. -> what `write_part` says of each.

    Raises DataError for a source that is there and cannot be read, or when none is there.
    """
    made = {}
    for name, rows in candidates(debian, questions).items():
        kept = [row for row in rows if row.id not in set(left_out.get(name, ()))]
        part = PARTS[name]
        made[name] = write_part(out / name, chosen(kept, part.queries, part.passages))
    if not made:
        raise DataError(f"{debian} holds none of the packages that the sets are made of")
    return made


def candidates(debian: Path, questions: Path | None) -> dict[str, list[Row]]:
    """All rows of each part whose sources are there."""
    found = {}
    for name, part in PARTS.items():
        if name == "terms" and not (debian / FOLDOC).exists():
            continue
        if rows := list(part.rows(debian, questions or Path("/nowhere"))):
            found[name] = rows
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write retrieval sets to choose checkpoints by.")
    parser.add_argument("debian", type=Path, help="unpacked packages, one folder each")
    parser.add_argument("out", type=Path, help="folder for the sets")
    parser.add_argument("--questions", type=Path, help="folder of the files of `questions`")
    parser.add_argument(
        "--choose",
        type=Path,
        metavar="TRAINING",
        help="leave out what overlaps with these training texts, and note it in the recipe",
    )
    arguments = parser.parse_args()
    try:
        recipe = json.loads(RECIPE.read_text()) if RECIPE.exists() else {}
        left_out = recipe.get("left_out", {})
        if arguments.choose:
            training = read_texts(arguments.choose)
            rows = candidates(arguments.debian, arguments.questions)
            left_out = {name: sorted(overlapping(rows[name], training)) for name in rows}
        made = build(arguments.debian, arguments.questions, arguments.out, left_out)
    except ModelError as error:
        print(f"validation_sets: {error}", file=sys.stderr)
        return 2
    if arguments.choose:
        RECIPE.write_text(json.dumps({"sets": made, "left_out": left_out}, indent=1) + "\n")
    for name in PARTS:
        if name not in made:
            print(f"{name}: its source is not there")
            continue
        print(f"{name}: {made[name]['queries']} queries on {made[name]['passages']} passages")
        if not arguments.choose and made[name] != recipe.get("sets", {}).get(name):
            print(f"validation_sets: {name} is not the set of the model card", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(console.run("validation_sets", main))
