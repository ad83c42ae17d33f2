"""Questions about rare terms: of each passage one or two of its rare words, asked for.

    python -m model.training.terms DATA [--most 60000]

Reads the passages of DATA/pairs.jsonl and DATA/pairs2.jsonl; writes DATA/pairs3.jsonl. A name means
what its own passages say and cannot be guessed: who answers these has to read the pieces of rare
words, which headings and sentences seldom ask for. Knows no tensors; `stages` drops the pairs that
the teacher finds unrelated.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from model import console
from model.training.examples import read_rows
from model.training.sources import SEED, TASK_QUESTION, Pair

TASK_KEYWORDS = "Given keywords, retrieve the passage that they stand in"
RARE = 30
"""A rare word stands in so many of the passages that are asked about, at most."""
LONGEST = 3
"""Words of a term."""
SHORTEST_PASSAGE = 80
UNNAMED = ("wordnet-base", "sotu", "moby-dick", "factbook")
"""Sources whose passages explain no term of their own: definitions, which have their word already,
speeches and stories, lists of figures."""
_WORD = re.compile(r"[A-Za-z](?:[\w+.#/-]*[\w+#])?")


def terms(passage: str, frequency: Counter[str]) -> list[str]:
    """Its runs of rare words, as they are written there, at most LONGEST words each, once each."""
    runs: list[list[re.Match[str]]] = []
    for word in _WORD.finditer(passage):
        if frequency[word[0].lower()] > RARE or len(word[0]) < 2:
            continue
        last = runs[-1] if runs else []
        if last and len(last) < LONGEST and passage[last[-1].end() : word.start()] == " ":
            last.append(word)
        else:
            runs.append([word])
    return list(dict.fromkeys(passage[run[0].start() : run[-1].end()] for run in runs))


def document_frequency(passages: Iterable[str]) -> Counter[str]:
    """Small-letter word -> how many of the passages have it."""
    frequency: Counter[str] = Counter()
    for passage in passages:
        frequency.update({word.lower() for word in _WORD.findall(passage)})
    return frequency


def term_pairs(passages: dict[str, str], rng: random.Random) -> Iterator[Pair]:
    """passages: passage -> its source. Half the pairs ask what a term is; of the others half are
    two terms of a passage that has two, and the rest one alone."""
    frequency = document_frequency(passages)
    for passage, source in passages.items():
        found = terms(passage, frequency)
        if not found:
            continue
        term = rng.choice(found)
        if rng.random() < 0.5:
            yield Pair(f"what is {term}?", passage, TASK_QUESTION, source)
        elif rng.random() < 0.5 and len(found) > 1:
            both = sorted(rng.sample(found, 2), key=passage.index)
            yield Pair(" ".join(both), passage, TASK_KEYWORDS, source)
        else:
            yield Pair(term, passage, TASK_KEYWORDS, source)


_PAIR = ("query", "positive", "task", "symmetric")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write pairs3.jsonl: rare terms, asked for.")
    parser.add_argument("data", type=Path, help="folder with pairs.jsonl and pairs2.jsonl")
    parser.add_argument("--most", type=int, default=60_000, help="pairs (default: %(default)s)")
    arguments = parser.parse_args()
    rng = random.Random(SEED)  # noqa: S311
    passages = {
        row["positive"]: str(row.get("source", ""))
        for name in ("pairs.jsonl", "pairs2.jsonl")
        for _, row in read_rows(arguments.data / name, _PAIR)
        if row.get("source") not in UNNAMED and len(row["positive"]) >= SHORTEST_PASSAGE
    }
    pairs = list(term_pairs(passages, rng))
    rng.shuffle(pairs)
    pairs = pairs[: arguments.most]
    with (arguments.data / "pairs3.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{pair.to_json()}\n" for pair in pairs)
    print(f"{len(pairs)} pairs of {len(passages)} passages: {Counter(p.source for p in pairs)}")


if __name__ == "__main__":
    sys.exit(console.run("terms", main))
