"""What `nv-embed train`, `mine` and `evaluate` do; server/cli.py defines their arguments.

Prints for people on stdout and, last, one line of JSON where there are figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.training.examples import read_examples, write_examples
from model.training.mining import ServerEmbedder, mine
from model.training.plot import plot
from model.training.settings import TrainingSettings


def train(arguments: argparse.Namespace) -> int:
    """Run or resume one run."""
    from model.training.trainer import Trainer

    changes = {"threads": arguments.threads} if arguments.threads else {}
    settings = TrainingSettings.read(arguments.settings, arguments.base, **changes)
    checkpoint = Trainer(settings, arguments.out).run()
    print(f"trained: {checkpoint}")
    try:
        print("drawn:", *plot(arguments.out))
    except UnsupportedError as error:
        print(f"not drawn: {error}")
    return 0


def mine_negatives(arguments: argparse.Namespace) -> int:
    """Read examples, write them with negatives."""
    examples = read_examples(arguments.examples)
    embed = embedder(arguments)
    mined = mine(examples, embed, count=arguments.count, threshold=arguments.threshold)
    write_examples(arguments.out, mined)
    print(f"{len(examples)} examples with negatives in {arguments.out}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Score a model (or BM25) on the sets that were named."""
    from model.training import evaluation

    if arguments.bm25 and not arguments.retrieval:
        raise UnsupportedError("--bm25 is a baseline of retrieval: name a set with --retrieval")
    if arguments.bm25 and (arguments.sts or arguments.classification or arguments.clustering):
        raise UnsupportedError("--bm25 scores --retrieval alone")
    sets = arguments.retrieval + arguments.sts + arguments.classification + arguments.clustering
    if not sets:
        raise UnsupportedError(
            "nothing to evaluate: name a set with --retrieval, --sts, --classification or "
            "--clustering"
        )
    tasks = evaluation.Tasks() if arguments.instructions else evaluation.Tasks("", "", "")
    scores: dict[str, dict[str, float]] = {}
    embed = None if arguments.bm25 else embedder(arguments)
    for folder in arguments.retrieval:
        data = evaluation.read_retrieval(folder)
        scores[str(folder)] = (
            evaluation.score_retrieval(embed, data, tasks) if embed else evaluation.score_bm25(data)
        )
    if embed:
        for path in arguments.sts:
            scores[str(path)] = evaluation.score_sts(embed, path, tasks)
        labelled: dict[Path, list[str]] = {}
        for path in arguments.classification:
            labelled.setdefault(path, []).extend(("knn", "logistic"))
        for path in arguments.clustering:
            labelled.setdefault(path, []).append("v-measure")
        for path, which in labelled.items():
            found = evaluation.score_labelled(embed, evaluation.read_labelled(path), tasks, which)
            scores.setdefault(str(path), {}).update(found)
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            print(f"{name:32} {metric:20} {value:.4f}")
    print(json.dumps({"model": _name(arguments), "scores": scores}))
    return 0


def _name(arguments: argparse.Namespace) -> str:
    if arguments.bm25:
        return "bm25"
    return str(arguments.url or arguments.teacher or arguments.model or "the shipped model")


def embedder(
    arguments: argparse.Namespace,
) -> Callable[[Sequence[str], str], NDArray[np.float32]]:
    """The model that the arguments name: a checkpoint, a server or a sentence-transformer."""
    if arguments.url:
        return ServerEmbedder(arguments.url)
    if arguments.teacher:
        from model.training.teacher import Teacher

        folder = None if arguments.teacher == "default" else arguments.teacher
        teacher = Teacher(folder, dtype=arguments.dtype)
        return lambda texts, _instruction: teacher.encode(texts)
    from model.encoder import Encoder
    from model.tokenizer import Truncation

    encoder = Encoder(
        arguments.model,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        threads=arguments.threads,
    )
    return lambda texts, instruction: encoder.encode(
        texts, instruction, max_tokens=arguments.max_tokens, truncate=Truncation.END
    )
