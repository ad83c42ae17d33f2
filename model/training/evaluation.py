"""`nv-embed evaluate`: score a model on sets from files.

The sets:
- STS: tab-separated as the STS Benchmark (…, score in column 5, sentences in 6 and 7), or JSON
  lines of `first`, `second`, `score`. Spearman of the cosines, the instruction on both sides.
- retrieval: a folder with corpus.jsonl and queries.jsonl (`id`, `text`) and qrels.tsv (query,
  document, grade), or with a SMART collection (*.ALL, *.QRY, *.REL).
- classification and clustering: CSV with the columns text and category (or label), and an
  optional column split (train, test); without it, one row in five by a checksum of its text is
  the test part.
Knows nothing of how the vectors are made: see `Embedder`.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from model.tokenizer import query_prefix
from model.training import metrics
from model.training.bm25 import BM25
from model.training.examples import DataError
from model.training.sources import TASK_BANKING, TASK_QUESTION, TASK_STS


class Embedder(Protocol):
    """texts and a verbatim instruction -> float32 [N, D], of length 1."""

    def __call__(self, texts: Sequence[str], instruction: str, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    documents: list[str]
    queries: list[str]
    relevant: list[dict[int, float]]  # of each query: place in documents -> grade


@dataclass(frozen=True, slots=True)
class LabelledSet:
    train: list[tuple[str, str]]  # text, label
    test: list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Tasks:
    """The instructions' task descriptions; empty means none. The first two are the authors'
    (NQ, STS), the third mteb's for Banking77, used for every classification and clustering."""

    retrieval: str = TASK_QUESTION
    sts: str = TASK_STS
    classification: str = TASK_BANKING


def read_sts(path: Path) -> tuple[list[str], list[str], NDArray[np.float64]]:
    rows: list[tuple[str, str, float]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            if path.suffix == ".jsonl":
                row = json.loads(line)
                rows.append((row["first"], row["second"], float(row["score"])))
            else:
                columns = line.split("\t")
                rows.append((columns[5], columns[6], float(columns[4])))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{path}, line {number}: {error!r}") from None
    first, second, scores = zip(*rows, strict=True)
    return list(first), list(second), np.array(scores)


def read_retrieval(folder: Path) -> RetrievalSet:
    """A folder of JSON lines, or a SMART collection. Raises DataError."""
    if smart := sorted(folder.glob("*.ALL")):
        return _read_smart(smart[0])
    documents = _read_jsonl(folder / "corpus.jsonl")
    queries = _read_jsonl(folder / "queries.jsonl")
    judged: dict[str, dict[str, float]] = {}
    path = folder / "qrels.tsv"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        columns = line.split("\t")
        try:
            judged.setdefault(columns[0], {})[columns[-2]] = float(columns[-1])
        except (ValueError, IndexError):
            if number > 1:  # the first line may name the columns
                raise DataError(f"{path}, line {number}: not query, document, grade") from None
    return _retrieval_set(documents, queries, judged)


def _read_jsonl(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            title = f"{row['title']} " if row.get("title") else ""
            found[str(row.get("id", row.get("_id")))] = title + row["text"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}, line {number}: {error!r}") from None
    return found


def _read_smart(path: Path) -> RetrievalSet:
    """SMART's fields: .I id, .T title, .W text; others (.A, .B, .X) are left out."""
    judged: dict[str, dict[str, float]] = {}
    for line in path.with_suffix(".REL").read_text().splitlines():
        query, document = line.split()[:2]
        judged.setdefault(query, {})[document] = 1.0
    documents = _smart_records(path)
    return _retrieval_set(documents, _smart_records(path.with_suffix(".QRY")), judged)


def _smart_records(path: Path) -> dict[str, str]:
    records: dict[str, str] = {}
    for record in re.split(r"(?m)^\.I ", path.read_text(encoding="latin-1"))[1:]:
        number, _, body = record.partition("\n")
        fields = re.findall(r"(?ms)^\.([A-Z])\s*\n(.*?)(?=^\.[A-Z]\s*$|\Z)", body)
        text = " ".join(value for name, value in fields if name in "TW")
        records[number.strip()] = re.sub(r"\s+", " ", text).strip()
    return records


def _retrieval_set(
    documents: dict[str, str], queries: dict[str, str], judged: dict[str, dict[str, float]]
) -> RetrievalSet:
    places = {name: place for place, name in enumerate(documents)}
    used = [name for name in queries if judged.get(name)]
    relevant = [{places[d]: grade for d, grade in judged[q].items() if d in places} for q in used]
    return RetrievalSet(list(documents.values()), [queries[q] for q in used], relevant)


def read_labelled(path: Path) -> LabelledSet:
    """CSV with text, category or label, and perhaps split. Raises DataError."""
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            label = row.get("category") or row.get("label")
            text = row.get("text")
            if not label or not text:
                raise DataError(f"{path}, line {number}: no text or no category")
            chosen = row.get("split") or ("train", "test")[zlib.crc32(text.encode()) % 5 == 0]
            (test if chosen == "test" else train).append((text, label))
    return LabelledSet(train, test)


def score_sts(embed: Embedder, path: Path, tasks: Tasks) -> dict[str, float]:
    first, second, scores = read_sts(path)
    instruction = query_prefix(tasks.sts) if tasks.sts else ""
    cosines = metrics.cosine_rows(embed(first, instruction), embed(second, instruction))
    return {"spearman": metrics.spearman(cosines, scores)}


def score_retrieval(embed: Embedder, data: RetrievalSet, tasks: Tasks) -> dict[str, float]:
    instruction = query_prefix(tasks.retrieval) if tasks.retrieval else ""
    queries = embed(data.queries, instruction)
    return metrics.retrieval_scores(queries @ embed(data.documents, "").T, data.relevant)


def score_bm25(data: RetrievalSet) -> dict[str, float]:
    return metrics.retrieval_scores(BM25(data.documents).scores(data.queries), data.relevant)


def score_labelled(
    embed: Embedder, data: LabelledSet, tasks: Tasks, which: Sequence[str]
) -> dict[str, float]:
    """which: of knn, logistic and v-measure (of the test part)."""
    instruction = query_prefix(tasks.classification) if tasks.classification else ""
    labels = [label for _, label in data.test]
    test = embed([text for text, _ in data.test], instruction)
    scores: dict[str, float] = {}
    if "v-measure" in which:
        scores["v_measure"] = metrics.v_measure(test, labels)
    if {"knn", "logistic"} & set(which):
        train_labels = [label for _, label in data.train]
        train = embed([text for text, _ in data.train], instruction)
        known: dict[str, Callable[..., float]] = {
            "knn": metrics.knn_accuracy,
            "logistic": metrics.logistic_accuracy,
        }
        for name, score in known.items():
            if name in which:
                scores[f"{name}_accuracy"] = score(train, train_labels, test, labels)
    return scores
