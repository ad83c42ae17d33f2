"""`nv-embed download`: a model into the cache, before anything is to serve it."""

from __future__ import annotations

import argparse
import sys

from server import logs
from server.cli.flags import add_family, located
from server.cli.parsing import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "download",
        help="fetch a model into the cache",
        description="Fetch a model from the Hugging Face hub into its cache (HF_HOME) and print "
        "the folder. What is there already is not fetched again, so an interrupted download goes "
        "on. With --offline it only looks whether all is there, and is status 2 if not.",
        epilog="Example: nv-embed download nvidia/NV-Embed-v2",
    )
    parser.add_argument("model", metavar="MODEL", help="hub id, or a checkpoint folder to look at")
    add_family(parser)
    parser.add_argument(
        "--revision", help="commit, tag or branch of a hub id; NVIDIA's ids have a pinned one"
    )
    parser.add_argument("--offline", action="store_true", help="fetch nothing")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    logs.configure("text", "info")
    from model.weights.headers import weight_files

    source = located(arguments)
    size = sum(file.size for file in weight_files(source.path))
    if source.notice:
        print(source.notice, file=sys.stderr)
    revision = f", revision {source.revision}" if source.revision else ""
    print(f"{source.model_id}: {size / 1e9:.2f} GB of weights{revision}", file=sys.stderr)
    print(source.path)
    return 0
