"""What `nv-embed train`, `mine`, `synthesize` and `evaluate` do. server/cli/ has their arguments.

Prints for people on stdout and, last, one line of JSON where there are figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.families import Side
from model.hub import packaged_checkpoint
from model.progress import Progress
from model.tokenizer import Truncation
from model.training import answers, bootstrap, evaluation, mteb_adapter, synthesis
from model.training.asking import ask_all
from model.training.case import CASES, changed
from model.training.chat import ChatModel
from model.training.embedders import Embedder, LocalEmbedder
from model.training.evaluation import NamedSet
from model.training.evaluation_report import write_report
from model.training.examples import (
    DataError,
    Example,
    check_output,
    read_examples,
    write_examples,
)
from model.training.mining import mine
from model.training.plot import plot
from model.training.remote import ServerEmbedder
from model.training.round_trip import verdicts
from model.training.settings import TrainingSettings
from model.training.synthesis import SynthesisSettings
from model.user_files import locked


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
    check_output(arguments.out, [arguments.examples, *_settings_files(arguments)])
    examples = read_examples(arguments.examples)
    if not examples:
        raise DataError(f"{arguments.examples} is empty")
    embed = embedder(arguments)
    mined = mine(examples, embed, count=arguments.count, threshold=arguments.threshold)
    found: Counter[int] = Counter()

    def counted() -> Iterator[Example]:
        with Progress(len(examples), "Mining", "examples") as bar:
            for example in mined:
                found[len(example.negatives)] += 1
                bar.advance()
                yield example

    write_examples(arguments.out, counted(), arguments.examples)
    few = sum(number for negatives, number in found.items() if negatives < arguments.count)
    print(
        f"{len(examples)} examples in {arguments.out}; {few} of them have fewer than "
        f"{arguments.count} negatives, {found[0]} none"
    )
    return 0


def synthesize(arguments: argparse.Namespace) -> int:
    """Ask a chat model for examples, or for those that are missing; write what stands the test."""
    out: Path = arguments.out
    kept = out.with_name(f"{out.name}.answers")
    for path in (out, kept):
        check_output(path, _settings_files(arguments))
    if out.exists() and not kept.exists():
        raise DataError(f"{out} exists, and {kept.name} does not: name another output")
    embed = embedder(arguments) if arguments.filter else None
    chat = ChatModel(
        arguments.chat_url,
        arguments.chat_model,
        arguments.chat_api_key,
        temperature=arguments.temperature,
    )
    settings = SynthesisSettings(
        chat.name,
        arguments.kinds,
        arguments.tasks,
        arguments.examples_per_task,
        arguments.languages,
        arguments.temperature,
        arguments.max_retries,
        arguments.seed,
    )
    with (
        locked(out.with_name(f".{out.name}.lock"), out),
        answers.opened(kept, settings.to_json()) as store,
    ):
        ask_all(settings, chat, store, arguments.concurrency)
        found = synthesis.found(settings, store.known)
        if not any(found.tasks.values()):
            raise DataError(
                f"{chat.name} named no task in {len(store.known)} answers "
                f"({_listed(found.malformed)}): try another model, or another --temperature"
            )
        examples = list(chain.from_iterable(found.examples.values()))
        dropped: Counter[str] = Counter()
        if embed:
            groups = found.examples.values()
            judged = chain.from_iterable(verdicts(g, embed, arguments.keep_top) for g in groups)
            pairs = list(zip(examples, judged, strict=True))
            dropped.update(verdict for _, verdict in pairs if verdict != "kept")
            examples = [example for example, verdict in pairs if verdict == "kept"]
        write_examples(out, examples, kept)
        used = list(store.known.values())
    malformed = sum(found.malformed.values())
    print(
        f"{len(examples)} examples in {out}; of {len(used)} answers {malformed} were malformed; "
        f"{sum(dropped.values())} examples did not stand the round trip"
    )
    counts = {
        "examples": len(examples),
        "tasks": found.tasks,
        "answers": len(used),
        "malformed": dict(found.malformed),
        **{n: found.counts[n] for n in ("given_up", "duplicate_tasks", "duplicate_queries")},
        "round_trip": dict(dropped) if embed else None,
        "prompt_tokens": sum(answer.prompt_tokens for answer in used),
        "completion_tokens": sum(answer.completion_tokens for answer in used),
    }
    print(json.dumps({"out": str(out), "model": chat.name, **counts}))
    return 0


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common())


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
    named_sets = list(chain.from_iterable(sets.values()))
    # All that can be wrong with a file is said before a model is loaded, and an hour of work.
    for named in named_sets:
        if not named.path.exists():
            raise DataError(f"there is no {named.path}")
    mteb_tasks = mteb_adapter.named_tasks(arguments.mteb) if arguments.mteb else []
    if arguments.report and arguments.report == arguments.items:
        raise UnsupportedError("--items and --report name the same file")
    for output in filter(None, [arguments.items, arguments.report]):
        read = filter(None, [arguments.against, arguments.projection])
        files = chain.from_iterable(evaluation.files_of(named.path) for named in named_sets)
        check_output(output, chain(read, files, _settings_files(arguments)))
    other = bootstrap.Other(arguments.against) if arguments.against else None
    read_sets = _read(sets)
    if arguments.case:
        for named in sets["retrieval"]:
            data = read_sets.retrieval[named]
            case = CASES[arguments.case]
            read_sets.retrieval[named] = data.with_queries(partial(changed, case=case))
    embed = None if arguments.bm25 else _measured(arguments)
    scores = _scores(embed, read_sets)
    if embed and mteb_tasks:
        model = mteb_adapter.MtebModel(
            embed, _mteb_name(arguments, embed), instructions=arguments.instructions
        )
        scores.update(mteb_adapter.evaluate_tasks(model, mteb_tasks, arguments.results))
    digests = {named.name: evaluation.digest_of(named.path) for named in named_sets}
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
    result = {"model": _name(arguments), "scores": scores} | bootstrap.as_json(judged)
    if arguments.report:
        write_report(arguments.report, judged, result, digests, arguments.against)
    print(json.dumps(result))
    return 0


@dataclass(frozen=True, slots=True)
class _ReadSets:
    """The sets of one call, read; labelled ones with what is scored of them."""

    retrieval: dict[NamedSet, evaluation.RetrievalSet]
    sts: dict[NamedSet, evaluation.StsSet]
    labelled: dict[NamedSet, tuple[evaluation.LabelledSet, list[str]]]


def _read(sets: Mapping[evaluation.Kind, Sequence[NamedSet]]) -> _ReadSets:
    """Raises DataError naming the file and the line."""
    retrieval = {named: evaluation.read_retrieval(named.path) for named in sets["retrieval"]}
    for named, data in retrieval.items():
        if data.missing:
            print(f"{named.path}: {data.missing} relevant documents are not in its corpus")
    which: dict[NamedSet, list[str]] = {}
    for named in sets["classification"]:
        which.setdefault(named, []).extend(("knn", "logistic"))
    for named in sets["clustering"]:
        which.setdefault(named, []).append("v-measure")
    return _ReadSets(
        retrieval,
        {named: evaluation.read_sts(named.path) for named in sets["sts"]},
        {n: (evaluation.read_labelled(n.path, asked), asked) for n, asked in which.items()},
    )


def _scores(embed: Embedder | None, sets: _ReadSets) -> dict[str, dict[str, float]]:
    """Name of a set -> its measures; embed: None for BM25, of retrieval alone."""
    scores: dict[str, dict[str, float]] = {}
    for named, data in sets.retrieval.items():
        scores[named.name] = dict(
            evaluation.score_retrieval(embed, data, named) if embed else evaluation.score_bm25(data)
        )
    if embed is None:
        return scores
    for named, pairs in sets.sts.items():
        scores[named.name] = dict(evaluation.score_sts(embed, pairs, named))
    for named, (labelled, which) in sets.labelled.items():
        found = evaluation.score_labelled(embed, labelled, named, which)
        scores.setdefault(named.name, {}).update(found)
    return scores


def _settings_files(arguments: argparse.Namespace) -> Iterator[Path]:
    """Files that say how a command runs."""
    for name in ("config", "api_key_file", "chat_api_key_file"):
        if path := getattr(arguments, name, None):
            yield Path(path)


def _named_set(argument: str, kind: evaluation.Kind, instructions: bool) -> NamedSet:
    named = evaluation.named_set(argument, kind)
    return named if instructions else NamedSet(named.name, named.path)


def _mteb_name(arguments: argparse.Namespace, embed: Embedder) -> str:
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


def _measured(arguments: argparse.Namespace) -> Embedder:
    """The model that is scored, its vectors projected or cut as the arguments say."""
    width, projection = arguments.dimensions, None
    if arguments.projection:
        from model.training.teacher import Projection

        projection = Projection.load(arguments.projection)
    embed = embedder(arguments)
    if not projection and not width:
        return embed

    def changed_rows(texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
        rows = embed(texts, side, task)
        if projection:
            rows = projection(rows)
        if width and width > rows.shape[1]:
            raise UnsupportedError(f"--dimensions {width}: the vectors have {rows.shape[1]}")
        rows = rows[:, :width]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    return changed_rows


def embedder(arguments: argparse.Namespace) -> Embedder:
    """The model that the arguments name: a checkpoint, a server or a sentence-transformer."""
    if arguments.url:
        return ServerEmbedder(arguments.url, api_key=arguments.api_key)
    if arguments.teacher:
        from model.training.teacher import Teacher

        folder = None if arguments.teacher == "default" else arguments.teacher
        teacher = Teacher(folder, dtype=arguments.dtype, device=arguments.device)
        return lambda texts, _side, _task: teacher.encode(texts, progress=sys.stderr.isatty())
    from model.encoder import Encoder

    encoder = Encoder(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        family=arguments.family,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        threads=arguments.threads,
        cpu_products=arguments.cpu_products,
        fused_kernels=arguments.fused_kernels,
    )
    return LocalEmbedder(encoder, max_tokens=arguments.max_tokens, truncate=Truncation.END)
