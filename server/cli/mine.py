"""`nv-embed mine`: hard negatives for training examples. Needs the extra `training`."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.options import add_embedder, settle_embedder
from server.cli.parsing import Commands, fraction, whole_number
from server.settings import KeySettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "mine",
        help="find hard negatives for training examples",
        description="Give each example hard negatives: positives of other examples that a teacher "
        "finds close to the query, but clearly less close than the example's own positive. Those "
        "nearer than the threshold are left out, for they may answer the query as well. The "
        "teacher is whichever model is named below; the larger, the better the negatives. Old "
        "negatives are replaced; a bad line stops the command with its number.",
        epilog="Example: nv-embed mine pairs.jsonl -o mined.jsonl --teacher default",
    )
    parser.add_argument(
        "examples",
        type=Path,
        metavar="FILE",
        help="JSON lines of query, positive and, if wanted, task (model/training/README.md)",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON lines with negatives")
    parser.add_argument(
        "--count",
        type=whole_number(1, 1000),
        default=7,
        help="negatives of each example, fewer where there are no more (default: %(default)s, as "
        "in the paper)",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        default=0.95,
        help="a negative's score stays below this times the positive's; smaller is safer and "
        "easier (default: %(default)s, as in the paper)",
    )
    add_embedder(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    settle_embedder(arguments, KeySettings)
    from model.training import commands

    return commands.mine_negatives(arguments)
