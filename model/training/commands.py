"""What `nv-embed train`, `mine` and `evaluate` do; server/cli/ defines their arguments.

Prints for people on stdout and, last, one line of JSON where there are figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.errors import UnsupportedError
from model.hub import packaged_checkpoint
from model.training import bootstrap, evaluation, mteb_adapter
from model.training.case import CASES, changed
from model.training.examples import DataError, Example, read_examples, write_examples
from model.training.mining import mine
from model.training.plot import plot
from model.training.remote import ServerEmbedder
from model.training.settings import TrainingSettings


def train(arguments: argparse.Namespace) -> int:
    """Run or resume one run."""
    from model.training.trainer import Trainer

    changes = {} if arguments.threads is None else {"threads": arguments.threads}
    settings = TrainingSettings.read(arguments.settings, arguments.base, **changes)
    checkpoint = Trainer(settings, arguments.out, device=arguments.device).run()
    print(f"trained: {checkpoint}")
    try:
        print("drawn:", *plot(arguments.out))
    except UnsupportedError as error:
        print(f"not drawn: {error}")
    return 0


def mine_negatives(arguments: argparse.Namespace) -> int:
    """Read examples, write them with negatives."""
    examples = read_examples(arguments.examples)
    if not examples:
        raise DataError(f"{arguments.examples} is empty")
    embed = embedder(arguments)
    mined = mine(examples, embed, count=arguments.count, threshold=arguments.threshold)
    bar = tqdm(mined, "Mining", total=len(examples), unit=" examples", disable=None)
    found: Counter[int] = Counter()

    def counted() -> Iterator[Example]:
        for example in bar:
            found[len(example.negatives)] += 1
            yield example

    write_examples(arguments.out, counted())
    few = sum(number for negatives, number in found.items() if negatives < arguments.count)
    print(
        f"{len(examples)} examples in {arguments.out}; {few} of them have fewer than "
        f"{arguments.count} negatives, {found[0]} none"
    )
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Score a model (or BM25) on the sets and mteb tasks that were named."""
    given = {kind: getattr(arguments, kind) for kind in evaluation.DEFAULT_TASKS}
    if arguments.bm25 and (arguments.mteb or any(given[k] for k in given if k != "retrieval")):
        raise UnsupportedError("--bm25 scores --retrieval alone")
    if arguments.bm25 and not arguments.retrieval:
        raise UnsupportedError("--bm25 is a baseline of retrieval: name a set with --retrieval")
    if not arguments.mteb and not any(given.values()):
        raise UnsupportedError(
            "nothing to evaluate: name a set with --retrieval, --sts, --classification or "
            "--clustering, or a task with --mteb"
        )
    sets = {
        kind: [_named_set(argument, kind, arguments.instructions) for argument in texts]
        for kind, texts in given.items()
    }
    for named in (named for of_kind in sets.values() for named in of_kind):
        if not named.path.exists():  # said before an hour of work on the others
            raise DataError(f"there is no {named.path}")
    mteb_tasks = mteb_adapter.named_tasks(arguments.mteb) if arguments.mteb else []
    if arguments.items:
        bootstrap.claim(arguments.items)
    other = bootstrap.Other(arguments.against) if arguments.against else None
    scores: dict[str, dict[str, float]] = {}
    embed = None if arguments.bm25 else _measured(arguments)
    for named in sets["retrieval"]:
        data = evaluation.read_retrieval(named.path)
        if data.missing:
            print(f"{named.path}: {data.missing} relevant documents are not in its corpus")
        if arguments.case:
            data = data.with_queries(partial(changed, case=CASES[arguments.case]))
        scores[named.name] = dict(
            evaluation.score_retrieval(embed, data, named) if embed else evaluation.score_bm25(data)
        )
    if embed:
        for named in sets["sts"]:
            scores[named.name] = dict(evaluation.score_sts(embed, named))
        labelled: dict[evaluation.NamedSet, list[str]] = {}
        for named in sets["classification"]:
            labelled.setdefault(named, []).extend(("knn", "logistic"))
        for named in sets["clustering"]:
            labelled.setdefault(named, []).append("v-measure")
        for named, which in labelled.items():
            found = evaluation.score_labelled(embed, named, which)
            scores.setdefault(named.name, {}).update(found)
    if embed and mteb_tasks:
        model = mteb_adapter.MtebModel(
            embed, _mteb_name(arguments, embed), instructions=arguments.instructions
        )
        scores.update(mteb_adapter.evaluate_tasks(model, mteb_tasks, arguments.results))
    digests = {
        named.name: evaluation.digest_of(named.path) for named in chain.from_iterable(sets.values())
    }
    if arguments.items:
        bootstrap.write_items(arguments.items, scores, digests)
    others = other.matching(scores, digests) if other else {}
    names = list(dict.fromkeys(named.name for named in sets["retrieval"]))
    if len(names) > 1:
        scores |= bootstrap.all_queries(scores, names)
        others |= bootstrap.all_queries(others, names)
    judged = list(bootstrap.judge(scores, others))
    for row in judged:
        print(row)
    result = {"model": _name(arguments), "scores": scores}
    print(json.dumps(result | bootstrap.as_json(judged)))
    return 0


def _named_set(argument: str, kind: evaluation.Kind, instructions: bool) -> evaluation.NamedSet:
    named = evaluation.named_set(argument, kind)
    return named if instructions else evaluation.NamedSet(named.name, named.path)


def _mteb_name(arguments: argparse.Namespace, embed: evaluation.Embedder) -> str:
    """organisation/model, the folder of the results."""
    if isinstance(embed, ServerEmbedder):
        return f"served/{embed.model}"
    named = arguments.teacher or arguments.model or str(packaged_checkpoint())
    is_hub_id = "/" in named and not Path(named).is_dir()
    return named if is_hub_id else f"local/{Path(named).resolve().name}"


def _name(arguments: argparse.Namespace) -> str:
    if arguments.bm25:
        return "bm25"
    return str(arguments.url or arguments.teacher or arguments.model or "the shipped model")


def _measured(arguments: argparse.Namespace) -> evaluation.Embedder:
    """The model that is scored, its vectors projected or cut as the arguments say."""
    embed, width = embedder(arguments), arguments.dimensions
    if not arguments.projection and not width:
        return embed
    from model.training.teacher import Projection

    projection = Projection.load(arguments.projection) if arguments.projection else None

    def changed_rows(texts: Sequence[str], instruction: str) -> NDArray[np.float32]:
        rows = embed(texts, instruction)
        if projection:
            rows = projection(rows)
        if width and width > rows.shape[1]:
            raise UnsupportedError(f"--dimensions {width}: the vectors have {rows.shape[1]}")
        rows = rows[:, :width]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    return changed_rows


def embedder(arguments: argparse.Namespace) -> evaluation.Embedder:
    """The model that the arguments name: a checkpoint, a server or a sentence-transformer."""
    if arguments.url:
        return ServerEmbedder(arguments.url, api_key=arguments.api_key)
    if arguments.teacher:
        from model.training.teacher import Teacher

        folder = None if arguments.teacher == "default" else arguments.teacher
        teacher = Teacher(folder, dtype=arguments.dtype, device=arguments.device)
        return lambda texts, _instruction: teacher.encode(texts, progress=sys.stderr.isatty())
    from model.encoder import Encoder
    from model.tokenizer import Truncation

    encoder = Encoder(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        threads=arguments.threads,
        cpu_products=arguments.cpu_products,
        fused_kernels=arguments.fused_kernels,
    )
    return lambda texts, instruction: encoder.encode(
        texts, instruction, max_tokens=arguments.max_tokens, truncate=Truncation.END
    )
