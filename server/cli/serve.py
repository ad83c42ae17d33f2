"""`nv-embed serve`: the server, and what it warns of before it starts."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from server import settings
from server.cli.options import settle
from server.cli.parsing import Commands

logger = logging.getLogger("nv_embed.cli")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="start the server",
        description="Start the server. Every option is also an environment variable (in brackets) "
        "and a line of the --config file; a flag wins over the environment, that over the file.",
        epilog="Example: nv-embed serve --model nvidia/NV-Embed-v2 --port 8000",
    )
    settings.add_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    options = settle(arguments, settings.Settings)
    config = getattr(arguments, "config", os.environ.get(f"{settings.ENV_PREFIX}CONFIG"))
    for warning in settings.exposed(options, config):
        logger.warning(warning)
    from model.hub import locate
    from server.http import lifecycle

    # Until lifecycle drains on it: a container's first process ignores SIGTERM by default, and a
    # download takes minutes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    source = locate(options.model, revision=options.revision, offline=options.offline)
    return lifecycle.run(options, source)
