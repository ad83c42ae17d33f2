"""Which training texts overlap with evaluation texts.

    python -m model.training.decontamination TRAIN.jsonl EVALUATION …

Two texts overlap when they share a run of `n` words, or, where one is shorter, when they are the
same words. The evaluation files are those of `nv-embed evaluate`, or plain JSON lines; with -o
the training lines that do not overlap are written. Knows no tensors.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from model import console
from model.training import evaluation
from model.training.evaluation import files_of
from model.training.examples import check_output, read_lines, read_text
from model.user_files import mode_like, replacing

NGRAM = 10
_WORD = re.compile(r"\w+")


def ngrams(text: str, n: int = NGRAM) -> Iterator[tuple[str, ...]]:
    """All runs of n words, lower-cased; the whole text when it is shorter."""
    words = _WORD.findall(text.lower())
    for start in range(max(1, len(words) - n + 1)):
        yield tuple(words[start : start + n])


class Evaluated:
    """The n-grams of the evaluation sets."""

    def __init__(self, texts: Iterable[str], n: int = NGRAM) -> None:
        self.n = n
        self.known = {gram for text in texts for gram in ngrams(text, n)}
        self.known.discard(())

    def overlaps(self, text: str) -> bool:
        return any(gram in self.known for gram in ngrams(text, self.n))


def texts_of(row: dict[str, Any]) -> list[str]:
    """The texts of one training line, whichever form it has."""
    keys = ("text", "query", "positive", "first", "second")
    found = [row[key] for key in keys if isinstance(row.get(key), str)]
    return found + [text for text in row.get("negatives") or () if isinstance(text, str)]


def evaluation_texts(path: Path) -> list[str]:
    """Every text of an evaluation set: STS, retrieval folder, CSV's test part, JSON lines."""
    if path.is_dir():
        data = evaluation.read_retrieval(path)
        return data.documents + data.queries
    if path.suffix == ".jsonl":
        return [text for line in read_lines(path) for text in texts_of(json.loads(line))]
    if "\t" in read_text(path).partition("\n")[0]:
        first, second, _ = evaluation.read_sts(path)
        return first + second
    return [text for text, _ in evaluation.read_labelled(path).test]


def main() -> None:
    parser = argparse.ArgumentParser(description="Find training lines that overlap with tests.")
    parser.add_argument("train", type=Path)
    parser.add_argument("evaluation", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, help="write the lines that do not overlap")
    parser.add_argument("-n", type=int, default=NGRAM, help="words (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.out:
        check_output(arguments.out, [arguments.train, *chain(*map(files_of, arguments.evaluation))])
    sets = {path: Evaluated(evaluation_texts(path), arguments.n) for path in arguments.evaluation}
    hits = dict.fromkeys(sets, 0)
    kept = []
    with arguments.train.open(encoding="utf-8") as file:
        for line in file:
            texts = texts_of(json.loads(line))
            found = [path for path, known in sets.items() if any(map(known.overlaps, texts))]
            for path in found:
                hits[path] += 1
            if not found:
                kept.append(line)
    if arguments.out:
        with replacing(arguments.out, mode_like(arguments.train.stat().st_mode)) as file:
            file.writelines(kept)
    for path, count in hits.items():
        print(f"{count} lines overlap with {path}")
    print(f"{len(kept)} lines do not")


if __name__ == "__main__":
    sys.exit(console.run("decontamination", main))
