"""What late chunks are worth: find the part of a long document that answers a query.

    python -m model.training.long_documents cisi/ [--model FOLDER] [--join 6]

Documents of a retrieval set are joined to long ones, in an order that is drawn once. The same
queries then look for the long documents that hold a relevant part, and for the parts themselves, in
three ways: one vector of each long document; a vector of each part by itself (plain chunks); and
late chunks, a vector of each part out of the forward of the whole. The parts are the documents that
were joined, so no way has the better cuts. A long document is as near as its nearest part.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding
from model.chunks import Chunks
from model.encoder import Encoder
from model.errors import InputTooLongError
from model.prompts import NO_PROMPT
from model.tokenizer import Truncation
from model.training import bootstrap, evaluation
from model.training.embedders import LocalEmbedder
from model.training.metrics import Figure, retrieval_scores

Vectors = NDArray[np.float32]
_BETWEEN = "\n"


def join(texts: Sequence[str], count: int) -> list[list[int]]:
    """Which texts make each long document: all, in an order drawn once, `count` at a time."""
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)  # noqa: S311
    return [order[first : first + count] for first in range(0, len(order), count)]


def spans_of(
    encoder: Encoder, texts: Sequence[str], groups: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[Encoding]]]:
    """Each long document's texts, and a span for each; one that does not fit is halved first."""
    todo = list(reversed(groups))
    while todo:
        group = todo.pop()
        bounds = list(accumulate((len(texts[i]) + len(_BETWEEN) for i in group), initial=0))
        runs = tuple((at, at + len(texts[i])) for at, i in zip(bounds, group, strict=False))
        long, chunks = _BETWEEN.join(texts[i] for i in group), Chunks("characters", runs=runs)
        try:
            spans = encoder.tokenizer.spans(long, NO_PROMPT, chunks, max_tokens=encoder.max_tokens)
        except InputTooLongError:
            if len(group) == 1:
                raise
            middle = len(group) // 2
            todo += [group[middle:], group[:middle]]
        else:
            yield group, spans


def score(
    encoder: Encoder, data: evaluation.RetrievalSet, count: int
) -> tuple[dict[str, dict[str, Figure]], str]:
    """-> (way -> what is looked for -> nDCG@10, what was looked through)."""
    embed = LocalEmbedder(encoder, truncate=Truncation.END)
    queries = embed(data.queries, "query", evaluation.task_texts("NQ")[0])
    plain = embed(data.documents, "passage")
    documents = list(spans_of(encoder, data.documents, join(data.documents, count)))
    whole = encoder.embed([Encoding(spans[0].ids) for _, spans in documents])
    late = np.empty_like(plain)
    late[[index for group, _ in documents for index in group]] = encoder.embed(
        [span for _, spans in documents for span in spans]
    )
    owner = {index: number for number, (group, _) in enumerate(documents) for index in group}
    relevant = [
        {owner[place]: 1.0 for place, grade in judged.items() if grade > 0 and place in owner}
        for judged in data.relevant
    ]

    def of_documents(scores: Vectors) -> Figure:
        return retrieval_scores(scores, relevant)["ndcg@10"]

    def of_both(vectors: Vectors) -> dict[str, Figure]:
        scores = queries @ vectors.T
        nearest = [scores[:, list(group)].max(axis=1) for group, _ in documents]
        return {
            "document": of_documents(np.stack(nearest, axis=1)),
            "part": retrieval_scores(scores, data.relevant)["ndcg@10"],
        }

    figures = {
        "whole": {"document": of_documents(queries @ whole.T)},
        "plain chunks": of_both(plain),
        "late chunks": of_both(late),
    }
    length = round(float(np.mean([len(spans[0].ids) for _, spans in documents])))
    return figures, f"{len(documents)} documents of {length} tokens, {len(plain)} parts"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", type=Path, help="a retrieval set, as nv-embed evaluate reads it")
    parser.add_argument("--model", help="a checkpoint's folder; by default the one that ships")
    parser.add_argument("--join", type=int, default=6, help="parts of a long document (6)")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    encoder = Encoder(options.model, threads=options.threads)
    figures, what = score(encoder, evaluation.read_retrieval(options.set), options.join)
    print(f"{options.set}: {what}; nDCG@10 with its interval of 95 %")
    for way, found in figures.items():
        for sought, figure in found.items():
            low, high = bootstrap.interval(figure)
            print(f"{way:13} {sought:9} {figure:.3f} [{low:.3f}, {high:.3f}]")
    for sought, figure in figures["late chunks"].items():
        plain = figures["plain chunks"][sought]
        low, high = bootstrap.difference(figure, plain)
        print(f"late - plain  {sought:9} {figure - plain:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()
