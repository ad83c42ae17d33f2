"""The data of the two stages, from pairs, texts, their vectors and the labelled sets.

    python -m model.training.stages DATA --vectors DIR [--sts FILE] [--banking77 FILE] [--by label]

Reads DATA/pairs.jsonl and DATA/texts.jsonl; writes stage1.jsonl, stage2.jsonl, of the STS file
scored.jsonl and, for the distillation that goes on beside, stage-texts.jsonl and stage-vectors/.
Pairs that the teacher finds unrelated are dropped; negatives are mined with it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model import console
from model.families import Side
from model.training.examples import (
    DataError,
    Example,
    ScoredPair,
    is_held_out,
    read_examples,
    read_texts,
    write_examples,
)
from model.training.mining import THRESHOLD, below, hard_negatives, mine
from model.training.questions import TASK_UTTERANCE, training_utterances
from model.training.sources import (
    SEED,
    TASK_BANKING,
    TASK_STS,
    banking_rows,
    sts_rows,
)
from model.training.teacher import Teacher, load_vectors

RELATED = 0.3
"""A pair whose teacher's cosine is less is no good pair (headings such as "Notes")."""
NEGATIVES = 7
STS_POSITIVE = 4.0


class Known:
    """Texts with their teacher's vectors: an Embedder to which side and task do not matter."""

    def __init__(self, texts: Sequence[str], vectors: NDArray[np.floating]) -> None:
        rows = vectors.astype(np.float32)
        self.rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        self.place = {text: place for place, text in enumerate(texts)}

    def __call__(
        self, texts: Sequence[str], side: Side = "query", task: str = "", /
    ) -> NDArray[np.float32]:
        return self.rows[[self.place[text] for text in texts]]  # type: ignore[no-any-return]


def related(examples: Sequence[Example], known: Known) -> list[Example]:
    """Pairs with both vectors known and a cosine of at least RELATED."""
    pairs = [e for e in examples if e.query in known.place and e.positive in known.place]
    cosines = (known([e.query for e in pairs]) * known([e.positive for e in pairs])).sum(axis=1)
    return [pair for pair, cosine in zip(pairs, cosines, strict=True) if cosine >= RELATED]


def class_examples(
    rows: Sequence[tuple[str, str]], known: Known, task: str, rng: random.Random
) -> list[Example]:
    """Classification and clustering by example, from (text, label): a class-mate, and some of the
    nearest texts of other classes (fewer than NEGATIVES where there are no more).

    A text that has no class-mate gives no example. Raises DataError for fewer than two labels.
    """
    classes: dict[str, list[str]] = defaultdict(list)
    for text, label in rows:
        classes[label].append(text)
    if len(classes) < 2:
        raise DataError("examples of classes need two labels or more")
    labels = np.array([label for _, label in rows])
    matrix = known([text for text, _ in rows])
    examples = []
    for place, (text, label) in enumerate(rows):
        mates = [mate for mate in classes[label] if mate != text]
        if not mates:
            continue
        scores = np.where(labels == label, -np.inf, matrix @ matrix[place])
        chosen = [rows[i][0] for i in _some_of_the_nearest(scores, rng)]
        examples.append(Example(text, rng.choice(mates), tuple(chosen), task, True))
    return examples


def label_examples(
    rows: Sequence[tuple[str, str]], known: Known, task: str, rng: random.Random
) -> list[Example]:
    """The same by label: the positive is the label's own text (`label_text`, which `known` has,
    too), the negatives are some of the nearest other labels. A label is a passage: it gets no
    instruction.

    A text's other labels, where it has several, are no negatives; a text that is its label, or has
    all of them, gives no example. Raises DataError for fewer than two labels.
    """
    named: dict[str, set[str]] = defaultdict(set)
    for text, label in rows:
        named[text].add(label_text(label))
    labels = list(dict.fromkeys(label_text(label) for _, label in rows))
    if len(labels) < 2:
        raise DataError("examples of classes need two labels or more")
    places = {label: place for place, label in enumerate(labels)}
    matrix, texts = known(labels), known([text for text, _ in rows])
    examples = []
    for (text, label), row in zip(rows, texts, strict=True):
        positive = label_text(label)
        scores = matrix @ row
        scores[[places[own] for own in named[text]]] = -np.inf
        chosen = [labels[i] for i in _some_of_the_nearest(scores, rng)]
        if text == positive or not chosen:
            continue
        examples.append(Example(text, positive, tuple(chosen), task))
    return examples


CLASS_EXAMPLES = {"example": class_examples, "label": label_examples}
"""The two ways to make labelled texts contrastive, both in the paper."""
BY = (
    "how classes become examples: the positive is another text of the label (example), or the "
    "label itself as words (label) (default: %(default)s)"
)


def label_text(label: str) -> str:
    """A label as words: card_arrival becomes "card arrival". The dash of -1 is no such dash."""
    text = re.sub(r"(?<=[^\W_])[-_]+(?=[^\W_])", " ", label)
    # Its hash would keep a whole class out of training. A label is not what is measured.
    return f"{text}." if is_held_out(text) else text


def _some_of_the_nearest(scores: NDArray[np.floating], rng: random.Random) -> list[int]:
    """Places of NEGATIVES of the 4 × NEGATIVES best scores, or of fewer; those of -inf are out."""
    pool = min(4 * NEGATIVES, int((scores > -np.inf).sum()))
    nearest = np.argpartition(-scores, pool)[:pool]  # what is out comes behind them
    return [int(place) for place in rng.sample(list(nearest), min(NEGATIVES, pool))]


def sts_examples(rows: Sequence[ScoredPair], known: Known, task: str = TASK_STS) -> list[Example]:
    """Pairs of score >= 4 (of 5), both ways round; negatives mined among all sentences."""
    sentences = list(dict.fromkeys(s for row in rows for s in (row.first, row.second)))
    place = {sentence: row for row, sentence in enumerate(sentences)}
    alike: dict[str, set[int]] = defaultdict(set)  # scored 3 and more: not a negative
    for row in rows:
        if row.score >= 3:
            alike[row.first].add(place[row.second])
            alike[row.second].add(place[row.first])
    matrix = known(sentences)
    examples = []
    for row in rows:
        if row.score < STS_POSITIVE or row.first == row.second:
            continue
        for query, positive in ((row.first, row.second), (row.second, row.first)):
            scores = matrix @ matrix[place[query]]
            most = below(scores[place[positive]], THRESHOLD)
            scores[[place[query], *alike[query]]] = -np.inf
            chosen = hard_negatives(scores, most, NEGATIVES)
            texts = tuple(sentences[i] for i in chosen)
            if texts:  # stage 2 learns from hard negatives alone
                examples.append(Example(query, positive, texts, task, True))
    return examples


def with_texts_of(
    examples: Sequence[Example],
    texts: list[str],
    vectors: NDArray[np.floating],
    encode: Callable[[list[str]], NDArray[np.float32]],
) -> tuple[list[str], NDArray[np.floating]]:
    """The texts and their vectors, and behind them those of the examples that were missing."""
    wanted = dict.fromkeys(text for e in examples for text in (e.query, e.positive))
    known = set(texts)
    if missing := [text for text in wanted if text not in known]:
        vectors = np.concatenate([vectors, encode(missing)])
    return texts + missing, vectors


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the data of stage 1 and stage 2.")
    parser.add_argument("data", type=Path)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--last-text", type=int, help="use the first so many texts only")
    parser.add_argument("--pairs", type=int, help="mine for the first so many pairs only")
    parser.add_argument(
        "--embed-pairs",
        action="store_true",
        help="embed what the pairs have that the texts lack; these are distilled, too, so take out "
        "what overlaps with evaluation sets before",
    )
    parser.add_argument("--sts", type=Path)
    parser.add_argument("--banking77", type=Path)
    parser.add_argument("--utterances", type=Path, help="folder with clinc150-train.jsonl.gz")
    parser.add_argument("--by", choices=list(CLASS_EXAMPLES), default="example", help=BY)
    parser.add_argument("--teacher", help="folder of a sentence-transformers model")
    arguments = parser.parse_args()
    data: Path = arguments.data
    rng = random.Random(SEED)  # noqa: S311
    vectors = load_vectors(arguments.vectors)[: arguments.last_text]
    texts = read_texts(data / "texts.jsonl")[: len(vectors)]

    sts = sts_rows(arguments.sts) if arguments.sts else []
    banking = banking_rows(arguments.banking77, development=False) if arguments.banking77 else []
    uttered = training_utterances(arguments.utterances) if arguments.utterances else []
    if arguments.utterances and not uttered:
        raise DataError(f"{arguments.utterances} holds no clinc150-train.jsonl.gz")
    labelled = [text for text, _ in banking + uttered]
    labelled += [text for row in sts for text in (row.first, row.second)]
    if arguments.by == "label":
        labelled += [label_text(label) for _, label in banking + uttered]
    read = read_examples(data / "pairs.jsonl")[: arguments.pairs]
    if arguments.embed_pairs:
        texts, vectors = with_texts_of(read, texts, vectors, Teacher(arguments.teacher).encode)
    clean = len(texts)  # of these the stages distil; what was cleaned away stays away
    extra = sorted(set(labelled) - set(texts))
    if extra:
        vectors = np.concatenate([vectors, Teacher(arguments.teacher).encode(extra)])
        texts += extra
    known = Known(texts, vectors)

    pairs = related(read, known)
    mined = [e for e in mine(pairs, known, count=NEGATIVES) if e.negatives]
    stage2 = mined[:6000] + sts_examples(sts, known)
    for rows, task in ((banking, TASK_BANKING), (uttered, TASK_UTTERANCE)):
        if rows:
            stage2 += CLASS_EXAMPLES[arguments.by](rows, known, task, rng)
    rng.shuffle(stage2)
    write_examples(data / "stage1.jsonl", mined)
    write_examples(data / "stage2.jsonl", stage2)
    if sts:
        scored = (asdict(replace(row, task=TASK_STS)) for row in sts)
        (data / "scored.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in scored))
    with (data / "stage-texts.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts[:clean])
    (data / "stage-vectors").mkdir(exist_ok=True)
    np.save(data / "stage-vectors" / "00000.npy", vectors[:clean].astype(np.float16))
    print(f"stage 1: {len(mined)} examples; stage 2: {len(stage2)}; {clean} texts")


if __name__ == "__main__":
    sys.exit(console.run("stages", main))
