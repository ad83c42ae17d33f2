"""Sets from files and their scores, for `nv-embed evaluate`.

- STS: tab-separated as the STS Benchmark (…, score in column 5, sentences in 6 and 7), or JSON
  lines of `first`, `second`, `score`. Spearman of the cosines; both sentences are queries.
- retrieval: a folder with corpus.jsonl and queries.jsonl (`id`, `text`) and qrels.tsv (query,
  document, grade), or with a SMART collection (*.ALL, *.QRY, *.REL). The task is described to
  the queries alone, unless it says something for passages, too. A relevant document that the
  corpus lacks counts as not found, as in trec_eval.
- classification and clustering: CSV with the columns text and category (or label), and an
  optional column split (train, test); without it, one row in five by a checksum of its text is
  the test part. Every text is a query.

Owns which task a set gets when none is named. Knows nothing of how the vectors are made, and of
what a family writes around a text: see `Embedder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.tasks import TASKS, find_variant
from model.training import metrics
from model.training.bm25 import BM25
from model.training.embedders import Embedder
from model.training.examples import DataError, read_lines, read_rows, text_of
from model.training.metrics import Figure
from model.training.sources import read_labelled_rows

Kind = Literal["sts", "retrieval", "classification", "clustering"]

DEFAULT_TASKS: dict[Kind, str] = {
    "sts": "STS",
    "retrieval": "NQ",
    # mteb's, for sets that have none of their own
    "classification": "Classify user passages.",
    "clustering": "Identify categories in user passages.",
}

FITTED = frozenset(("knn", "logistic"))
"""Scores of labelled sets that the training rows are needed for."""


@dataclass(frozen=True, slots=True)
class NamedSet:
    """A set of the command line, and its task as each side's texts get it described."""

    name: str  # as it was given
    path: Path
    query: str = ""  # empty: by nothing
    passage: str = ""


StsSet = tuple[list[str], list[str], NDArray[np.float64]]
"""First sentences, second sentences, scores."""


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    documents: list[str]
    queries: list[str]
    relevant: list[dict[int, float]]
    """Of each query: place in documents -> grade; places behind the end are missing ones."""

    def with_queries(self, change: Callable[[str], str]) -> RetrievalSet:
        """The same set, each query changed."""
        return replace(self, queries=[change(query) for query in self.queries])

    @property
    def missing(self) -> int:
        """Relevant documents that the corpus lacks."""
        last = len(self.documents)
        return len({place for judged in self.relevant for place in judged if place >= last})


@dataclass(frozen=True, slots=True)
class LabelledSet:
    train: list[tuple[str, str]]  # text, label
    test: list[tuple[str, str]]


def named_set(argument: str, kind: Kind) -> NamedSet:
    """PATH or PATH=TASK, where TASK is a name or a text (`task_texts`), or nothing for none.

    An argument that is an existing path is taken whole, whatever it holds.
    """
    path, equals, task = argument.partition("=")
    if not equals or Path(argument).exists():
        path, task = argument, DEFAULT_TASKS[kind]
    query, passage = task_texts(task)
    return NamedSet(argument, Path(path), query, passage if kind == "retrieval" else query)


def task_texts(task: str) -> tuple[str, str]:
    """The descriptions for query and passage of a task of the shared table (nq, sts, banking77, …),
    or a text, verbatim, for the query. Raises UnsupportedError for one word that is no name.
    """
    if found := find_variant(task):
        return found.query, found.passage
    if task and not re.search(r"\s", task):
        raise UnsupportedError(
            f"there is no task {task!r}; known: {', '.join(TASKS)} (a text of several words is "
            "taken verbatim)"
        )
    return task, ""


def read_sts(path: Path) -> StsSet:
    """Raises DataError naming the file and the line."""
    rows: list[tuple[str, str, float]] = []
    if path.suffix.lower() == ".jsonl":
        for number, row in read_rows(path, ("first", "second", "score")):
            where = f"{path}, line {number}"
            pair = text_of(row, "first", where), text_of(row, "second", where)
            rows.append((*pair, _number(row.get("score"), "score", where)))
    else:
        for number, line in enumerate(read_lines(path), 1):
            where, columns = f"{path}, line {number}", line.split("\t")
            if len(columns) < 7:
                raise DataError(f"{where}: {len(columns)} columns, the sentences are in 6 and 7")
            rows.append((columns[5], columns[6], _number(columns[4], "score", where)))
    if not rows:
        raise DataError(f"{path} is empty")
    first, second, scores = zip(*rows, strict=True)
    return list(first), list(second), np.array(scores)


def _number(value: object, what: str, where: str) -> float:
    """A finite number, also as a text. Raises DataError."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise DataError(f"{where}: {what} is {value!r:.40}, not a number")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_retrieval(folder: Path) -> RetrievalSet:
    """A folder of JSON lines, or a SMART collection. Raises DataError."""
    if smart := sorted(folder.glob("*.ALL")):
        return _read_smart(smart[0])
    documents = _read_jsonl(folder / "corpus.jsonl")
    queries = _read_jsonl(folder / "queries.jsonl")
    judged: dict[str, dict[str, float]] = {}
    path = folder / "qrels.tsv"
    for number, line in enumerate(read_lines(path), 1):
        columns, where = line.split("\t"), f"{path}, line {number}"
        if len(columns) < 3:
            raise DataError(f"{where}: not query, document, grade")
        if number == 1 and not _is_number(columns[-1]):
            continue  # it names the columns
        judged.setdefault(columns[0], {})[columns[-2]] = _number(columns[-1], "the grade", where)
    return _retrieval_set(folder, documents, queries, judged)


def _read_jsonl(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, row in read_rows(path, ("id", "_id", "title", "text")):
        where, name = f"{path}, line {number}", row.get("id", row.get("_id"))
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise DataError(f"{where}: id is {'missing' if name is None else 'not a text'}")
        if str(name) in found:
            raise DataError(f"{where}: id {name!r} stands on an earlier line, too")
        title, text = row.get("title") or "", row.get("text")
        if not isinstance(text, str) or not isinstance(title, str):
            raise DataError(f"{where}: text is missing, or it or the title is not a text")
        found[str(name)] = f"{title} {text}" if title else text
    return found


def _read_smart(path: Path) -> RetrievalSet:
    """SMART's fields: .I id, .T title, .W text; others (.A, .B, .X) are left out."""
    judged: dict[str, dict[str, float]] = {}
    relevances = path.with_suffix(".REL")
    for number, line in enumerate(read_lines(relevances), 1):
        columns = line.split()
        if len(columns) < 2:
            raise DataError(f"{relevances}, line {number}: not query, document")
        judged.setdefault(columns[0], {})[columns[1]] = 1.0
    queries = _smart_records(path.with_suffix(".QRY"))
    return _retrieval_set(path.parent, _smart_records(path), queries, judged)


def _smart_records(path: Path) -> dict[str, str]:
    records: dict[str, str] = {}
    text = "\n".join(read_lines(path, "latin-1"))
    for record in re.split(r"(?m)^\.I ", text)[1:]:
        number, _, body = record.partition("\n")
        fields = re.findall(r"(?ms)^\.([A-Z])\s*\n(.*?)(?=^\.[A-Z]\s*$|\Z)", body)
        text = " ".join(value for name, value in fields if name in "TW")
        records[number.strip()] = re.sub(r"\s+", " ", text).strip()
    return records


def _retrieval_set(
    folder: Path,
    documents: dict[str, str],
    queries: dict[str, str],
    judged: dict[str, dict[str, float]],
) -> RetrievalSet:
    places = {name: place for place, name in enumerate(documents)}
    used = [name for name in queries if any(grade > 0 for grade in judged.get(name, {}).values())]
    if not documents or not used:
        raise DataError(f"{folder}: no document, or no query with a relevant one")
    relevant = [
        {places.setdefault(d, len(places)): grade for d, grade in judged[q].items() if grade > 0}
        for q in used
    ]
    return RetrievalSet(list(documents.values()), [queries[q] for q in used], relevant)


def read_labelled(path: Path, which: Sequence[str] = ()) -> LabelledSet:
    """which: what will be scored (`score_labelled`). Raises DataError naming the file and the line,
    and where the rows do not suffice for the scores."""
    rows = read_labelled_rows(path)
    train = [(row.text, row.label) for row in rows if not row.development]
    test = [(row.text, row.label) for row in rows if row.development]
    if not test:
        raise DataError(f"{path} has no test rows")
    if FITTED & set(which) and len({label for _, label in train}) < 2:
        raise DataError(f"{path}: the training rows have fewer than two labels")
    return LabelledSet(train, test)


def digest_of(path: Path) -> str:
    """SHA-256 of a set's file, or of all files of its folder: whether two sets are the same."""
    digest = hashlib.sha256()
    for file in files_of(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """A set's files: itself, or those of its folder."""
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in found if file.is_file()]


def score_sts(embed: Embedder, data: StsSet, named: NamedSet) -> dict[str, Figure]:
    first, second, scores = data
    vectors = embed(first, "query", named.query), embed(second, "query", named.query)
    return {"spearman": metrics.spearman(metrics.cosine_rows(*vectors), scores)}


def score_retrieval(embed: Embedder, data: RetrievalSet, named: NamedSet) -> dict[str, Figure]:
    queries = embed(data.queries, "query", named.query)
    documents = embed(data.documents, "passage", named.passage)
    return metrics.retrieval_scores(queries @ documents.T, data.relevant)


def score_bm25(data: RetrievalSet) -> dict[str, Figure]:
    return metrics.retrieval_scores(BM25(data.documents).scores(data.queries), data.relevant)


def score_labelled(
    embed: Embedder, data: LabelledSet, named: NamedSet, which: Sequence[str]
) -> dict[str, float]:
    """which: of knn, logistic and v-measure (of the test part)."""
    train_labels, labels = ([label for _, label in part] for part in (data.train, data.test))
    test = embed([text for text, _ in data.test], "query", named.query)
    scores: dict[str, float] = {}
    if "v-measure" in which:
        scores["v_measure"] = metrics.v_measure(test, labels)
    if FITTED & set(which):
        train = embed([text for text, _ in data.train], "query", named.query)
        known: dict[str, Callable[..., Figure]] = {
            "knn": metrics.knn_accuracy,
            "logistic": metrics.logistic_accuracy,
        }
        for name, score in known.items():
            if name in which:
                scores[f"{name}_accuracy"] = score(train, train_labels, test, labels)
    return scores
