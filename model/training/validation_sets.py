"""A retrieval set to choose checkpoints by, so that the reporting sets stay unseen.

    python -m model.training.validation_sets DEBIAN OUT

DEBIAN holds the unpacked Debian packages dict-foldoc, debian-handbook and debian-reference-en,
one folder each (`apt-get download NAME`, `dpkg -x`), which are in no training data. OUT gets
corpus.jsonl, queries.jsonl and qrels.tsv for `nv-embed evaluate --retrieval`. A word asks for its
entry, a heading for the first passage under it; the other passages of the manuals are distractors.
Which rows stay is decided by their hash: a text's place does not depend on the others. The texts
are under the GFDL (FOLDOC) and the GPL: for measuring, not for training or redistribution.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model import console
from model.errors import ModelError
from model.training.examples import DataError
from model.training.sources import SHORT_PASSAGE, is_prose, manual_sections, passages, squeeze

FOLDOC = "dict-foldoc/usr/share/dictd/foldoc.dict.dz"
MANUALS = {
    "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US/**/*.html",),
    "debian-reference-en": ("usr/share/**/*.en.html",),
}
QUERIES, PASSAGES = 400, 800
"""At most, of the dictionary and of the manuals each."""


@dataclass(frozen=True, slots=True)
class Row:
    """A passage, and the query it answers, or "" for a distractor."""

    passage: str
    query: str = ""

    @property
    def id(self) -> str:
        return hashlib.sha256(self.passage.encode()).hexdigest()[:16]


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


def manual_rows(folder: Path, patterns: Iterable[str]) -> Iterator[Row]:
    """Headings with their first passage; the passages behind it without a query."""
    for section in manual_sections(folder, patterns):
        for index, passage in enumerate(passages(section.paragraphs, SHORT_PASSAGE)):
            if len(passage) >= 60:
                asked = index == 0 and is_prose(section.heading)
                yield Row(passage, section.heading if asked else "")


def chosen(rows: Iterable[Row]) -> list[Row]:
    """At most QUERIES rows with a query and PASSAGES in all, in the order of their hashes.

    A query or a passage that comes twice has no one right answer: it goes, wherever it stands.
    """
    every = list(dict.fromkeys(rows))
    passages_of: dict[str, set[str]] = {}
    queries_of: dict[str, set[str]] = {}
    for row in every:
        queries_of.setdefault(row.passage, set()).add(row.query)
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
    asked = [row for row in unique if row.query][:QUERIES]
    rest = [row for row in unique if row not in set(asked)][: PASSAGES - len(asked)]
    return sorted(
        [*asked, *(Row(row.passage) for row in rest)],
        key=lambda row: row.id,
    )


def build(debian: Path, out: Path) -> tuple[int, int]:
    """Write the set. -> numbers of queries and passages. Raises DataError."""
    rows = chosen(dictionary_rows(debian / FOLDOC))
    manuals = [
        row
        for package, patterns in MANUALS.items()
        for row in manual_rows(debian / package, patterns)
    ]
    if not rows or not manuals:
        raise DataError(f"{debian} lacks one of dict-foldoc, {', '.join(MANUALS)}, or its texts")
    rows += chosen(manuals)
    out.mkdir(parents=True, exist_ok=True)
    asked = [row for row in rows if row.query]
    _write_lines(out / "corpus.jsonl", ((row.id, row.passage) for row in rows))
    _write_lines(out / "queries.jsonl", ((row.id, row.query) for row in asked))
    judged = "".join(f"{row.id}\t{row.id}\t1\n" for row in asked)
    (out / "qrels.tsv").write_text(judged, encoding="utf-8")
    return len(asked), len(rows)


def _write_lines(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    lines = (json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write a retrieval set to choose checkpoints by.")
    parser.add_argument("debian", type=Path, help="unpacked packages, one folder each")
    parser.add_argument("out", type=Path, help="folder for corpus, queries and judgements")
    arguments = parser.parse_args()
    try:
        queries, number = build(arguments.debian, arguments.out)
    except ModelError as error:
        print(f"validation_sets: {error}", file=sys.stderr)
        return 2
    print(f"{queries} queries on {number} passages in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(console.run("validation_sets", main))
