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

    def plain(texts: Sequence[str]) -> NDArray[np.float32]:
        return embed(texts, "")

    mined = mine(examples, plain, plain, count=arguments.count, threshold=arguments.threshold)
    write_examples(arguments.out, mined)
    print(f"{len(examples)} examples with negatives in {arguments.out}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Score a model (or BM25) on the sets that were named."""
    from model.training import evaluation

    tasks = evaluation.Tasks() if arguments.instructions else evaluation.Tasks("", "", "")
    scores: dict[str, dict[str, float]] = {}
    embed = None if arguments.bm25 else embedder(arguments)
    for folder in arguments.retrieval:
        data = evaluation.read_retrieval(folder)
        scores[folder.name] = (
            evaluation.score_retrieval(embed, data, tasks) if embed else evaluation.score_bm25(data)
        )
    if embed:
        for path in arguments.sts:
            scores[path.name] = evaluation.score_sts(embed, path, tasks)
        labelled: dict[Path, list[str]] = {}
        for path in arguments.classification:
            labelled.setdefault(path, []).extend(("knn", "logistic"))
        for path in arguments.clustering:
            labelled.setdefault(path, []).append("v-measure")
        for path, which in labelled.items():
            name = path.name if path.name not in scores else str(path)
            data_ = evaluation.read_labelled(path)
            scores[name] = evaluation.score_labelled(embed, data_, tasks, which)
    for name, found in scores.items():
        for metric, value in found.items():
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
    from model.hub import packaged_checkpoint
    from model.tokenizer import Truncation

    encoder = Encoder(
        arguments.model or packaged_checkpoint(), dtype=arguments.dtype, threads=arguments.threads
    )
    return lambda texts, instruction: encoder.encode(
        texts, instruction, max_tokens=arguments.max_tokens, truncate=Truncation.END
    )
