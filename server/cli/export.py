"""`nv-embed export`: a model as a folder that another program loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from server import logs
from server.cli.flags import add_family, located
from server.cli.parsing import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "export",
        help="write a model as sentence-transformers loads it",
        description="Write a folder that sentence-transformers loads without remote code, for the "
        "same vectors. nv-embed models need remote code there and are refused. The weights are "
        "linked, or copied on another disk. Says which releases it needs and what differs.",
        epilog="Example: nv-embed export intfloat/e5-mistral-7b-instruct "
        "--to sentence-transformers -o e5",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or hub id")
    parser.add_argument("--to", required=True, choices=["sentence-transformers"], help="for what")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    add_family(parser)
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--offline", action="store_true", help="use the local cache only")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    logs.configure("text", "info")
    from model.sentence_transformers_export import export

    source = located(arguments)
    said = export(source, arguments.output)
    print(f"written: {arguments.output} ({source.config().family.name})")
    for sentence in said:
        print(sentence)
    return 0
