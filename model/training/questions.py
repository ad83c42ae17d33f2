"""Questions and everyday English: converters of sources outside software, and of Perl's manual.

    python -m model.training.questions DATA --debian DIR --questions DIR

Writes DATA/texts2.jsonl, the fresh texts mixed with as many of DATA/texts.jsonl and the rest of
these behind them, and DATA/pairs2.jsonl. The folder of --debian holds unpacked packages (see
`sources`), that of --questions JSON lines, gzipped; what is not there is left out:

- medquad.jsonl.gz: question, answer, source (MedQuAD, CC BY 4.0);
- factbook.jsonl.gz: country, field, text (The World Factbook, public domain);
- clinc150-train.jsonl.gz: text, intent (CLINC150's training part, CC BY 3.0).

Of Debian's packages perl-doc (Artistic or GPL) and wamerican-huge (SCOWL, permissive) are read.

One disease, country or intent in ten is for `validation_sets` and never trained on: which ones is
decided here and nowhere else. Knows no tensors.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from model import console
from model.training.examples import DataError, read_rows
from model.training.sources import (
    LONG_PASSAGE,
    SEED,
    SHORT_PASSAGE,
    TASK_DOCUMENTATION,
    TASK_QUESTION,
    Pair,
    Section,
    distillation_texts,
    is_prose,
    passages,
    section_pairs,
    squeeze,
)

TASK_HEALTH = "Given a health question, retrieve passages that answer the question"
TASK_COUNTRY = "Given a country and a topic, retrieve the passage that describes it"
TASK_UTTERANCE = "Given a user utterance as query, find the user intents"
PERL = "perl-doc/usr/share/perl/*/pod/*[!a].pod"
"""Without perl…delta.pod, which are lists of changes."""
WORDS = "wamerican-huge/usr/share/dict/american-english-huge"
SINGLE_WORDS = 30_000
"""Of the word list: rare spellings, a few tokens each."""
EVERYDAY = ("banking77", "sts-benchmark")
"""Of DATA/texts.jsonl these stand in front: everyday English, of which it has little."""
_VALIDATION = 10

_TOPIC = re.compile(
    r"(?i)^(?:what (?:is|are|causes)\b(?: \(are\))?(?: the (?:symptoms|treatments|stages|outlook|"
    r"complications|genetic changes)\b(?: (?:of|for|related to))?)?|is\b|how many people are "
    r"affected by|how to (?:diagnose|prevent)|who is at risk for|what (?:research \(or clinical "
    r"trials\) is being done|to do) for|do you have information about)\s+(?P<topic>.+?)"
    r"(?: inherited)?[\s?]*$"
)
_CODE = re.compile(r"[A-Z]<<+\s+(.*?)\s+>>+|[A-Z]<([^<>]*)>")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, the text that answers it, and what it is about."""

    query: str
    passage: str
    group: str

    @property
    def for_validation(self) -> bool:
        return is_for_validation(self.group)


def is_for_validation(group: str) -> bool:
    """Whether a disease, country or intent is kept for `validation_sets`: by its hash."""
    return zlib.crc32(group.lower().encode()) % _VALIDATION == 0


def health_rows(folder: Path) -> Iterator[Asked]:
    """MedQuAD's questions, each with its whole answer; the group is the disease."""
    for row in _rows(folder / "medquad.jsonl.gz", ("question", "answer")):
        question = squeeze(row["question"].replace("(are) ", "")).rstrip(" ?") + "?"
        match = _TOPIC.match(question)
        yield Asked(question, squeeze(row["answer"]), match["topic"] if match else question)


def country_rows(folder: Path) -> Iterator[Asked]:
    """The Factbook's fields as "Country, topic", each with its text; the group is the country."""
    for row in _rows(folder / "factbook.jsonl.gz", ("country", "field", "text")):
        if len(row["country"]) == 2:
            continue  # codes of oceans and of the EU, which nobody asks for
        topic = row["field"].partition(": ")[2] or row["field"]
        topic = topic if topic[:2].isupper() else topic[:1].lower() + topic[1:]
        yield Asked(f"{row['country']}, {topic}", squeeze(row["text"]), row["country"])


def utterances(folder: Path) -> Iterator[tuple[str, str]]:
    """(text, intent) of CLINC150's training part."""
    for row in _rows(folder / "clinc150-train.jsonl.gz", ("text", "intent")):
        yield squeeze(row["text"]), row["intent"]


def training_utterances(folder: Path) -> list[tuple[str, str]]:
    """Those whose intent is not for validation."""
    return [row for row in utterances(folder) if not is_for_validation(row[1])]


def _rows(path: Path, keys: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The objects of a gzipped file of JSON lines; none when it is absent. Raises DataError."""
    if not path.is_file():
        return
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not all(isinstance(row.get(key), str) for key in keys):
                    raise DataError(f"{path}, line {number}: not {', '.join(keys)}")
                yield row
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def pod_sections(path: Path) -> Iterator[Section]:
    """The headings of one page in Perl's plain old documentation, with the prose under them."""
    title = heading = ""
    prose: list[str] = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="ignore")):
        command = re.match(r"=(\w+)\s*(.*)", block, re.DOTALL)
        if command and command[1].startswith("head"):
            if prose:
                yield Section(title, heading, tuple(prose))
            heading, prose = _plain(command[2]), []
            title = title or path.stem
        elif not command and heading and not block.startswith((" ", "\t")):
            text = _plain(block)
            prose += [text] if len(text) >= 40 and is_prose(text) else []
    if prose:
        yield Section(title, heading, tuple(prose))


def _plain(text: str) -> str:
    """Without formatting codes, B<so>, L<text|page> and the like, also one in another."""
    for _ in range(3):
        text = _CODE.sub(lambda code: code[1] or code[2].rpartition("|")[2], text)
    return squeeze(text)


def question_pairs(debian: Path, folder: Path, rng: random.Random) -> Iterator[Pair]:
    """Training pairs of all these sources."""
    for task, source, rows in (
        (TASK_HEALTH, "medquad", health_rows(folder)),
        (TASK_COUNTRY, "factbook", country_rows(folder)),
    ):
        for row in rows:
            limit = LONG_PASSAGE if rng.random() < 0.2 else SHORT_PASSAGE
            if not row.for_validation and (passage := next(passages([row.passage], limit), "")):
                yield Pair(row.query, passage, task, source)
    for path in sorted(debian.glob(PERL)):
        for pair in section_pairs(pod_sections(path), "perl-doc", rng):
            asks = pair.query.endswith("?")
            task = TASK_QUESTION if asks and pair.task == TASK_DOCUMENTATION else pair.task
            yield Pair(pair.query, pair.positive, task, pair.source)


def single_texts(debian: Path, folder: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(text, source): what has no partner, utterances, the answers' later passages, words."""
    for text, _ in training_utterances(folder):
        yield text, "clinc150"
    for source, rows in (("medquad", health_rows(folder)), ("factbook", country_rows(folder))):
        for row in rows:
            if not row.for_validation:
                for passage in list(passages([row.passage], SHORT_PASSAGE))[1:]:
                    yield passage, source
    words = debian / WORDS
    if words.is_file():
        found = [word for word in words.read_text(encoding="utf-8").split() if "'" not in word]
        for word in rng.sample(found, min(SINGLE_WORDS, len(found))):
            yield word, "wamerican-huge"


def mixed(fresh: Iterable[str], old: list[str], rng: random.Random) -> list[str]:
    """The fresh texts among as many old ones, and the rest of these behind them, each once."""
    known = set(old)
    new = [text for text in fresh if text not in known]
    first = new + old[: len(new)]
    rng.shuffle(first)
    return first + old[len(new) :]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write texts2.jsonl and pairs2.jsonl.")
    parser.add_argument("data", type=Path, help="folder with texts.jsonl")
    parser.add_argument("--debian", type=Path, required=True, help="unpacked packages")
    parser.add_argument("--questions", type=Path, required=True, help="gzipped JSON lines")
    arguments = parser.parse_args()
    rng = random.Random(SEED)  # noqa: S311
    pairs = list(question_pairs(arguments.debian, arguments.questions, rng))
    singles = single_texts(arguments.debian, arguments.questions, rng)
    fresh = distillation_texts(pairs, Path(), singles, rng)
    rng.shuffle(pairs)
    old = {
        row["text"]: row.get("source")
        for _, row in read_rows(arguments.data / "texts.jsonl", ("text",))
    }
    texts = mixed(fresh, sorted(old, key=lambda text: old[text] not in EVERYDAY), rng)
    with (arguments.data / "pairs2.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{pair.to_json()}\n" for pair in pairs)
    with (arguments.data / "texts2.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            row = {"text": text} | ({"source": fresh[text]} if text in fresh else {})
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{len(pairs)} pairs: {Counter(pair.source for pair in pairs)}")
    print(f"{len(fresh)} fresh texts of {len(texts)}: {Counter(fresh.values())}")


if __name__ == "__main__":
    sys.exit(console.run("questions", main))
