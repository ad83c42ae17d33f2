"""`nv-embed verify`: the proof that a checkpoint gives the authors' vectors on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.flags import add_flags
from server.cli.options import settle
from server.cli.parsing import Commands
from server.settings import ModelSettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "verify",
        help="prove that a checkpoint gives the authors' vectors here",
        description="Check a checkpoint on this machine against the values published with it, and "
        "measure. Prints a table and, last, a line of JSON. The exit status is 1 if a check fails.",
    )
    add_flags(parser, ModelSettings)
    parser.add_argument(
        "--golden",
        type=Path,
        help="JSON of the authors' outputs (default: golden.json in the checkpoint's folder)",
    )
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    arguments.device = settle(arguments, ModelSettings).one_device()
    from model.verify import command

    return command.run(arguments)
