"""`nv-embed train`: the recipe's training runs. Needs the extra `training`."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.flags import add_flags
from server.cli.options import settle
from server.cli.parsing import Commands
from server.settings import MachineSettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model by the two-stage recipe",
        description="Run the training that a settings file describes, or go on with it where it "
        "stopped. The result is a checkpoint in the layout of the one that it starts from.",
        epilog="Example: nv-embed train stage1.json -o runs/stage1",
    )
    parser.add_argument("settings", type=Path, metavar="SETTINGS", help="JSON of one run")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--base", type=Path, help="where the settings' relative paths start (default: beside them)"
    )
    add_flags(parser, MachineSettings)  # what else there is stands in SETTINGS
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    arguments.device = settle(arguments, MachineSettings).one_device()
    from model.training import commands

    return commands.train(arguments)
