"""`nv-embed evaluate`: scores of a model, or of what a server gives. Needs the extra `training`."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.options import add_embedder, settle_embedder
from server.cli.parsing import Commands, whole_number
from server.settings import KeySettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="score a model on sets from files, or on mteb's tasks",
        description="Score embeddings: Spearman (STS); nDCG@10, MRR@10 and recall@100 (retrieval); "
        "kNN and logistic regression (classification); V-measure (clustering). Each option may be "
        "repeated. Prints a table, each score with its 95 %% interval (bootstrap), and, last, a "
        "line of JSON. The instruction of a set stands "
        "behind its path: PATH=TASK, TASK being a name that GET /v1/instructions lists (NQ, STS, "
        "Banking77 and others, in any case), a description in words, or nothing for none. Without "
        "it: NQ's for retrieval, STS's for STS, and mteb's general ones for classification "
        "(Classify user passages.) and clustering (Identify categories in user passages.). "
        "Queries alone get it in retrieval, all texts elsewhere; it is written in the template of "
        "the model's family.",
        epilog="Example: nv-embed evaluate --sts sts-dev.csv --retrieval cisi/=nq "
        "--classification banking77/train.csv=banking77",
    )
    _add_sets(parser)
    _add_variations(parser)
    _add_comparison(parser)
    add_embedder(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_sets(parser: argparse.ArgumentParser) -> None:
    for name, kind in (
        ("sts", "STS Benchmark's columns, or JSON lines of first, second and score"),
        ("retrieval", "folder of corpus.jsonl, queries.jsonl, qrels.tsv, or a SMART collection"),
        ("classification", "CSV of text and category or label, and perhaps split"),
        ("clustering", "likewise; the test part is scored"),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="PATH[=TASK]", help=kind
        )
    parser.add_argument(
        "--mteb",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="mteb's tasks by name, for instance STS12 SciFact; their data are downloaded. "
        "Instructions: the authors' where there are any, else mteb's (extra mteb)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("mteb-results"),
        help="folder for the files that mteb writes (default: %(default)s)",
    )


def _add_variations(parser: argparse.ArgumentParser) -> None:
    """What is changed before it is scored: the texts, or the vectors."""
    parser.add_argument(
        "--no-instructions",
        dest="instructions",
        action="store_false",
        help="describe no task; what the model's family writes around a side's texts stays",
    )
    parser.add_argument("--bm25", action="store_true", help="the lexical baseline instead")
    parser.add_argument(
        "--case",
        choices=("lower", "upper", "title"),
        help="retrieval's queries in this case: how much a model minds",
    )
    parser.add_argument(
        "--projection",
        type=Path,
        metavar="FILE",
        help="map the vectors by this file of `initialise` first: with --teacher, the most that "
        "distillation can reach",
    )
    parser.add_argument(
        "--dimensions",
        type=whole_number(1, 65_536),
        metavar="N",
        help="score the first N numbers of each vector, made to length 1 again",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="keep what each query, pair or text scored, for --against of another run",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write the scores as a page with plots (HTML, one file), too",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="another run's --items: prints the differences, with their intervals (paired)",
    )


def run(arguments: argparse.Namespace) -> int:
    settle_embedder(arguments, KeySettings)
    from model.training import commands

    return commands.evaluate(arguments)
