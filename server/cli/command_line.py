"""From the words of a call to an exit status: finds the command that is meant, and runs it.

model/console.py owns what becomes of errors.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from model import console
from model.errors import did_you_mean
from model.platform import resources
from server.cli import (
    download,
    encode,
    evaluate,
    export,
    gpu_check,
    mine,
    openapi,
    prune,
    serve,
    synthesize,
    train,
    verify,
)
from server.cli.parsing import Parser
from server.cli.streams import open_standard_streams
from server.errors import SettingsError
from server.settings import EMPTY

COMMANDS = (
    *(serve, download, encode, verify, gpu_check),
    *(train, mine, synthesize, evaluate, prune, export, openapi),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call."""
    open_standard_streams()
    resources.let_waiting_threads_sleep()  # here and in the workers, which inherit the environment

    def command() -> int:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        status: int = arguments.run(arguments)
        return status

    return console.run("nv-embed", command, (SettingsError,))


def parser() -> argparse.ArgumentParser:
    """With all commands; each sets `run` and `parser`."""
    whole = Parser(
        prog="nv-embed",
        description="Serve NV-Embed behind OpenAI's embeddings API, or use it from files.",
    )
    from importlib.metadata import version

    whole.add_argument("--version", action="version", version=version("nv-embed-server"))
    whole.set_defaults(run=_help, parser=whole)
    commands = whole.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return whole


def _help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help(sys.stderr)
    return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises SettingsError for an unknown flag, with the nearest known one, and an empty value."""
    for place, item in enumerate(argv):
        flag, equals, value = item.partition("=")
        if not item.strip() or (flag.startswith("--") and equals and not value.strip()):
            before = argv[place - 1] if place else ""
            name = flag if equals else before if before.startswith("-") else f"argument {place + 1}"
            raise SettingsError(f"{name}: {EMPTY}")
    arguments, unknown = parser().parse_known_args(argv)
    if unknown:
        flags = re.findall(r"--[a-z-]+", arguments.parser.format_help())
        hint = did_you_mean(unknown[0].partition("=")[0], flags)
        raise SettingsError(f"unrecognized argument {unknown[0]}{hint}")
    return arguments
