"""Converters: freely licensed texts -> distillation texts and training pairs.

    python -m model.training.sources OUT --debian DIR [--translations FILE] [--sts FILE]
                                        [--banking77 FILE] [--prose DIR]

DIR holds unpacked Debian packages, one folder each (`apt-get download NAME`, `dpkg -x`); a
package that is not there is left out. Which rows of a source may be used is decided here and
nowhere else: STS Benchmark without the files whose texts are not free, Banking77 without its
development rows. Knows no tensors. SOURCES.csv of the shipped model lists what was used.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from model import console
from model.training.examples import DataError, ScoredPair, check_names, read_lines, read_text

SEED = 20240527
SHORT_PASSAGE, LONG_PASSAGE = 420, 900
"""Characters of a passage; one in five is a long one. Short sequences train faster."""
STS_EXCLUDED = ("MSRpar", "headlines", "deft-")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_SPACES = re.compile(r"\s+")
_MENU_HEADINGS = frozenset(("Navigation", "Contents", "This Page", "Table of Contents"))

TASK_DOCUMENTATION = "Given a heading, retrieve the passage that stands under it"
TASK_SENTENCE = "Given a sentence, retrieve the passage that it was taken from"
TASK_DEFINITION = "Given a word, retrieve its definition"
TASK_PACKAGE = "Given a short description of a software package, retrieve its long description"
TASK_QUESTION = "Given a question, retrieve passages that answer the question"
TASK_STS = "Retrieve semantically similar text."
TASK_BANKING = "Given a online banking query, find the corresponding intents"


@dataclass(frozen=True, slots=True)
class Pair:
    """A query, a text that answers it, and what kind of question it is."""

    query: str
    positive: str
    task: str
    source: str

    def to_json(self) -> str:
        """A line of a file of examples."""
        row = {
            "query": self.query,
            "positive": self.positive,
            "task": self.task,
            "symmetric": self.task == TASK_STS,
            "source": self.source,
        }
        return json.dumps(row, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Section:
    """One heading of a manual with the text under it."""

    title: str
    heading: str
    paragraphs: tuple[str, ...]


# Manuals under permissive licences: package -> globs of the pages that are prose. Of pandas'
# user guide the cookbook is not among them: upstream it is made of Stack Overflow's answers,
# CC BY-SA, which is not permissive (Debian's own package leaves it empty; others need not).
MANUALS: dict[str, tuple[str, ...]] = {
    "python3.11-doc": ("usr/share/doc/python3.11/html/**/*.html",),
    "postgresql-doc-15": ("usr/share/doc/postgresql-doc-15/html/*.html",),
    "apache2-doc": ("usr/share/doc/apache2-doc/manual/en/**/*.html",),
    "sqlite3-doc": ("usr/share/doc/sqlite3/**/*.html",),
    "python-django-doc": tuple(
        f"usr/share/doc/python-django-doc/html/{part}/**/*.html"
        for part in ("topics", "ref", "howto", "faq", "intro", "internals")
    ),
    "python-sklearn-doc": tuple(
        f"usr/share/doc/python-sklearn-doc/html/{part}"
        for part in ("*.html", "modules/*.html", "auto_examples/**/*.html", "tutorial/**/*.html")
    ),
    "python-statsmodels-doc": (
        "usr/share/doc/python-statsmodels-doc/html/*.html",
        "usr/share/doc/python-statsmodels-doc/html/examples/**/*.html",
    ),
    "python-pandas-doc": (
        "usr/share/doc/python-pandas-doc/html/user_guide/[!c]*.html",
        "usr/share/doc/python-pandas-doc/html/user_guide/c[!o]*.html",
        "usr/share/doc/python-pandas-doc/html/getting_started/**/*.html",
    ),
    "rust-doc": tuple(
        f"usr/share/doc/rust-doc/html/{part}/**/*.html"
        for part in ("book", "reference", "nomicon", "rust-by-example", "cargo")
    ),
    "python-scipy-doc": ("usr/share/doc/python-scipy-doc/html/**/*.html",),
    "python-astropy-doc": ("usr/share/doc/python-astropy-doc/html/**/*.html",),
    "python-sympy-doc": ("usr/share/doc/python-sympy-doc/html/**/*.html",),
    "python-skimage-doc": ("usr/share/doc/python-skimage-doc/html/**/*.html",),
    "nodejs-doc": ("usr/share/doc/nodejs/api/*.html",),
    "llvm-15-doc": ("usr/share/doc/llvm-15-doc/html/*.html",),
}


class _Page(HTMLParser):
    """Collects the sections of one HTML page; code, menus and tables are left out."""

    _SKIP = frozenset(("script", "style", "nav", "pre", "table", "footer", "header", "title"))
    _BLOCKS = frozenset(("p", "li", "dd", "dt", "div", "section", "blockquote"))
    _HEADINGS = frozenset(("h1", "h2", "h3", "h4"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.title = ""
        self.sections: list[tuple[str, list[str]]] = []
        self._skipping: list[str] = []
        self._in_heading: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._SKIP:
            self._skipping.append(tag)
        elif tag in self._HEADINGS:
            self._flush()
            self._in_heading = tag
        elif tag in self._BLOCKS and self._in_heading is None:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag == self._skipping[-1]:
                self._skipping.pop()
        elif tag == self._in_heading:
            heading = re.sub(r"^(Chapter )?[\dA-Z]?[\d.]*\.\s", "", squeeze("".join(self._text)))
            heading = heading.rstrip("¶# ")
            self.sections.append((heading, []))
            if heading not in _MENU_HEADINGS:
                self.title = self.title or heading
            self._text, self._in_heading = [], None
        elif tag in self._BLOCKS and self._in_heading is None:
            self._flush()

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)

    def _flush(self) -> None:
        text = squeeze("".join(self._text))
        self._text = []
        if self.sections and len(text) >= 40:
            self.sections[-1][1].append(text)


def squeeze(text: str) -> str:
    return _SPACES.sub(" ", text).strip()


def is_prose(text: str) -> bool:
    """Mostly letters, some words, no markup left."""
    letters = sum(c.isalpha() or c == " " for c in text)
    noise = "://" in text or "checked-by:" in text  # the latter: SQLite's table of requirements
    return len(text.split()) >= 2 and letters >= 0.85 * len(text) and not noise


def split_sentences(text: str) -> list[str]:
    return [part for part in _SENTENCE_END.split(text) if part]


def passages(paragraphs: Iterable[str], limit: int) -> Iterator[str]:
    """Consecutive sentences joined while they fit `limit` characters."""
    current = ""
    for paragraph in paragraphs:
        for sentence in split_sentences(paragraph):
            if current and len(current) + 1 + len(sentence) > limit:
                yield current
                current = ""
            current = f"{current} {sentence}" if current else sentence[:limit]
    if current:
        yield current


def manual_sections(folder: Path, patterns: Iterable[str]) -> Iterator[Section]:
    """All sections of an unpacked package's pages, each page once."""
    seen: set[str] = set()
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            text = path.read_text(encoding="utf-8", errors="ignore")
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in seen or path.is_symlink():
                continue
            seen.add(digest)
            page = _Page()
            page.feed(text)
            for heading, paragraphs in page.sections:
                prose = tuple(p for p in paragraphs if is_prose(p))
                if prose and heading and heading not in _MENU_HEADINGS:
                    yield Section(page.title, heading, prose)


def manual_pairs(root: Path, package: str, rng: random.Random) -> Iterator[Pair]:
    """Those of one package of MANUALS."""
    return section_pairs(manual_sections(root / package, MANUALS[package]), package, rng)


def section_pairs(sections: Iterable[Section], source: str, rng: random.Random) -> Iterator[Pair]:
    """Heading -> first passage; a sentence -> the passage without it."""
    for section in sections:
        limit = LONG_PASSAGE if rng.random() < 0.2 else SHORT_PASSAGE
        for index, passage in enumerate(passages(section.paragraphs, limit)):
            if len(passage) < 60:
                continue
            if index == 0 and is_prose(section.heading):
                query = section.heading
                if section.title != section.heading and len(query.split()) < 4:
                    query = f"{section.title}: {section.heading}"
                yield Pair(query, passage, TASK_DOCUMENTATION, source)
            elif len(parts := split_sentences(passage)) >= 3:
                at = rng.randrange(len(parts))
                if 30 <= len(parts[at]) <= 250:
                    rest = " ".join(parts[:at] + parts[at + 1 :])
                    yield Pair(parts[at], rest, TASK_SENTENCE, source)


@dataclass(frozen=True, slots=True)
class Synset:
    words: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]


def synsets(root: Path) -> Iterator[Synset]:
    """WordNet's data files (their format: man 5 wndb)."""
    for part in ("noun", "verb", "adj", "adv"):
        path = root / "wordnet-base/usr/share/wordnet" / f"data.{part}"
        if not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue
            fields, _, gloss = line.partition(" | ")
            columns = fields.split(" ")
            count = int(columns[3], 16)
            words = [columns[4 + 2 * i].replace("_", " ") for i in range(count)]
            words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words]
            examples = re.findall(r'"([^"]{12,})"', gloss)
            definition = squeeze(re.sub(r';?\s*"[^"]*"?', "", gloss)).strip("; ")
            if definition:
                yield Synset(tuple(words), definition, tuple(squeeze(e) for e in examples))


def wordnet_pairs(root: Path, rng: random.Random) -> Iterator[Pair]:
    for synset in synsets(root):
        word = rng.choice(synset.words)
        form = rng.random()
        if form < 0.25 and len(synset.gloss.split()) > 4:
            yield Pair(f"what is {word}?", synset.gloss, TASK_QUESTION, "wordnet-base")
        elif form < 0.6:
            yield Pair(word, synset.gloss, TASK_DEFINITION, "wordnet-base")
        elif form < 0.8:
            yield Pair(synset.gloss, ", ".join(synset.words), TASK_STS, "wordnet-base")


def package_descriptions(translations: Path) -> Iterator[tuple[str, str, str]]:
    """(name, short line, body) of Debian's Translation-en file, plain or .lz4."""
    blocks = _read_lz4(translations) if translations.suffix == ".lz4" else translations.read_text()
    for block in blocks.split("\n\n"):
        match = re.match(r"Package: (\S+)\n.*?Description-en: (.*?)\n(.*)", block, re.DOTALL)
        if match:
            paragraphs = re.sub(r"(?m)^ \.$", "\n", match[3])
            body = [
                squeeze(p)
                for p in re.split(r"\n\s*\n", paragraphs)
                if not re.search(r"(?m)^  |^ [*-]", p)  # lists and verbatim lines
            ]
            yield match[1], match[2], " ".join(p for p in body if is_prose(p))


def _read_lz4(path: Path) -> str:
    import subprocess

    done = subprocess.run(  # noqa: S603
        ["/usr/lib/apt/apt-helper", "cat-file", str(path)], check=True, capture_output=True
    )
    return done.stdout.decode()


def package_pairs(translations: Path, rng: random.Random) -> Iterator[Pair]:
    seen: set[str] = set()
    for _name, short, body in package_descriptions(translations):
        body = next(passages([body], LONG_PASSAGE if rng.random() < 0.2 else SHORT_PASSAGE), "")
        key = body[:120]  # the many packages of one source share their text
        if len(body) < 80 or key in seen or not is_prose(short):
            continue
        seen.add(key)
        yield Pair(short, body, TASK_PACKAGE, "debian-descriptions")


def dictionary_pairs(root: Path) -> Iterator[Pair]:
    """The Jargon File and the Devil's Dictionary (public domain), entries at the margin."""
    for package, file in (("dict-jargon", "jargon"), ("dict-devil", "devil")):
        path = root / package / f"usr/share/dictd/{file}.dict.dz"
        if not path.is_file():
            continue
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        if file == "jargon":
            entries = re.findall(r"(?m)^(\S[^\n]*)\n((?:(?:[ ].*)?\n)+)", text)
        else:
            entries = re.findall(
                r"(?m)^([A-Z][A-Z -]+), (?:n|adj|v|adv)[^\n]*?\.(.*?)(?=\n\n)",
                text.replace("\r", ""),
                re.DOTALL,
            )
        for word, body in entries:
            prose = [squeeze(p) for p in re.split(r"\n\s*\n", body)]
            prose = [re.sub(r"[{}]", "", p) for p in prose if len(p) > 60]
            passage = next(passages(prose, SHORT_PASSAGE), "")
            if passage and len(word) < 40:
                word = word.capitalize() if word.isupper() else word
                yield Pair(f"what does {word} mean?", passage, TASK_QUESTION, package)


def prose_pairs(root: Path, rng: random.Random) -> Iterator[Pair]:
    """Speeches and books: one folder each with *.txt; a sentence and the passage around it."""
    for path in sorted(root.glob("*/**/*.txt")):
        source = path.relative_to(root).parts[0]
        text = path.read_text(encoding="utf-8", errors="ignore")
        paragraphs = [squeeze(part) for part in re.split(r"\n\s*\n", text)]
        limit = LONG_PASSAGE if rng.random() < 0.2 else SHORT_PASSAGE
        for passage in passages(filter(is_prose, paragraphs), limit):
            parts = split_sentences(passage)
            at = rng.randrange(len(parts))
            if len(parts) > 1 and 30 <= len(parts[at]) <= 250:
                rest = " ".join(parts[:at] + parts[at + 1 :])
                yield Pair(parts[at], rest, TASK_SENTENCE, source)


def sts_rows(path: Path) -> list[ScoredPair]:
    """STS Benchmark rows whose sentences are freely licensed, scored from 0 to 5."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        columns = line.split("\t")
        try:
            if not columns[1].startswith(STS_EXCLUDED):
                rows.append(ScoredPair(columns[5], columns[6], float(columns[4])))
        except (IndexError, ValueError) as error:
            raise DataError(f"{path}, line {number}: {error!r}") from None
    return rows


@dataclass(frozen=True, slots=True)
class LabelledRow:
    text: str
    label: str
    development: bool  # scored, and kept out of training


def is_development(text: str) -> bool:
    """One row in five, wherever it stands in the file."""
    return zlib.crc32(text.encode()) % 5 == 0


_LABELLED = ("text", "category", "label", "split")


def read_labelled_rows(path: Path) -> list[LabelledRow]:
    """CSV with the columns text, category (or label) and perhaps split (train, test); without a
    split `is_development` decides. Other columns are refused, but for those of IGNORED. Raises
    DataError naming the file and the line."""
    rows = []
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        check_names("column", reader.fieldnames or (), _LABELLED, f"{path}, line 1")
        for row in reader:
            if None in row:
                raise DataError(f"{path}, line {reader.line_num}: more fields than columns")
            text, label = row.get("text"), row.get("category") or row.get("label")
            if not label or not text:
                raise DataError(f"{path}, line {reader.line_num}: no text, or no category or label")
            split = row.get("split")
            if split not in (None, "", "train", "test"):
                raise DataError(
                    f"{path}, line {reader.line_num}: split is {split!r}, not train or test"
                )
            development = split == "test" if split else is_development(text)
            rows.append(LabelledRow(text, label, development))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def banking_rows(path: Path, *, development: bool) -> list[tuple[str, str]]:
    """(text, label) of Banking77's training file: the development rows, or the others."""
    rows = read_labelled_rows(path)
    return [(row.text, row.label) for row in rows if row.development == development]


def distillation_texts(
    pairs: Iterable[Pair], root: Path, extra: Iterable[tuple[str, str]], rng: random.Random
) -> dict[str, str]:
    """Text -> its source: both sides of the pairs, single sentences, words, examples."""
    texts: dict[str, str] = {}
    for pair in pairs:
        texts.setdefault(pair.query, pair.source)
        texts.setdefault(pair.positive, pair.source)
        parts = split_sentences(pair.positive)
        if len(parts) > 1:
            sentence = rng.choice(parts)
            if len(sentence) > 25:
                texts.setdefault(sentence, pair.source)
    for synset in synsets(root):
        texts.setdefault(synset.gloss, "wordnet-base")
        for example in synset.examples:
            texts.setdefault(example, "wordnet-base")
        if rng.random() < 0.3:
            word = rng.choice(synset.words)
            texts.setdefault(f"{word}: {synset.gloss}", "wordnet-base")
        for word in synset.words:  # rare words and terms alone: a few tokens each
            texts.setdefault(word, "wordnet-base")
    for text, source in extra:
        texts.setdefault(text, source)
    shuffled = list(texts.items())
    rng.shuffle(shuffled)  # so that any first part of the file is a fair sample
    return dict(shuffled)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write texts.jsonl and pairs.jsonl.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--debian", type=Path, required=True, help="unpacked packages")
    parser.add_argument("--translations", type=Path, help="Debian's Translation-en file")
    parser.add_argument("--sts", type=Path, help="STS Benchmark, training file")
    parser.add_argument("--banking77", type=Path, help="Banking77, train.csv")
    parser.add_argument("--prose", type=Path, help="folders of *.txt, in the public domain")
    arguments = parser.parse_args()
    rng = random.Random(SEED)  # noqa: S311
    pairs = list(wordnet_pairs(arguments.debian, rng))
    pairs += dictionary_pairs(arguments.debian)
    for package in MANUALS:
        pairs += manual_pairs(arguments.debian, package, rng)
    if arguments.prose:
        pairs += prose_pairs(arguments.prose, rng)
    if arguments.translations:
        pairs += package_pairs(arguments.translations, rng)
    rng.shuffle(pairs)

    extra: list[tuple[str, str]] = []
    if arguments.sts:
        for row in sts_rows(arguments.sts):
            extra += [(row.first, "sts-benchmark"), (row.second, "sts-benchmark")]
    if arguments.banking77:
        rows = banking_rows(arguments.banking77, development=False)
        extra += [(text, "banking77") for text, _ in rows]
    texts = distillation_texts(pairs, arguments.debian, extra, rng)

    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "pairs.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f"{pair.to_json()}\n" for pair in pairs)
    with (arguments.out / "texts.jsonl").open("w", encoding="utf-8") as file:
        for text, source in texts.items():
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    print(f"{len(pairs)} pairs: {Counter(pair.source for pair in pairs)}")
    print(f"{len(texts)} texts: {Counter(texts.values())}")


if __name__ == "__main__":
    sys.exit(console.run("sources", main))
