"""`nv-embed serve`: the server, and what it warns of before it starts."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from model.errors import FileError
from model.user_files import open_regular
from server.api_keys import SHORT_KEY
from server.cli.flags import add_flags
from server.cli.options import settle
from server.cli.parsing import Commands
from server.configuration import read_file
from server.errors import SettingsError
from server.settings import ENV_PREFIX, Settings

logger = logging.getLogger("nv_embed.cli")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="start the server",
        description="Start the server. Every option is also an environment variable (in brackets) "
        "and a line of the --config file; a flag wins over the environment, that over the file.",
        epilog="Example: nv-embed serve --model nvidia/NV-Embed-v2 --port 8000",
    )
    add_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    options = settle(arguments, Settings)
    config = getattr(arguments, "config", os.environ.get(f"{ENV_PREFIX}CONFIG"))
    for warning in exposed_secrets(options, config):
        logger.warning(warning)
    from model.hub import locate
    from server.http import lifecycle

    # Until lifecycle drains on it: a container's first process ignores SIGTERM by default, and a
    # download takes minutes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    source = locate(
        options.model, revision=options.revision, offline=options.offline, family=options.family
    )
    return lifecycle.run(options, source)


def exposed_secrets(settings: Settings, config: str | None) -> Iterator[str]:
    """Warnings about secrets that are easy to read or to guess; `config`: the file of options.

    Raises SettingsError for a file of keys or certificates that cannot be read.
    """
    files = {"--api-key-file": settings.api_key_file, "--tls-key": settings.tls_key}
    for option, path in {**files, "--tls-certificate": settings.tls_certificate}.items():
        try:
            if path is not None:
                open_regular(path).close()  # OpenSSL would wait for a FIFO
        except (OSError, FileError) as error:
            raise SettingsError(f"{option}: {error}") from None
    if config is not None and "api_key" in read_file(Path(config)):
        files["--config"] = Path(config)
    for option, path in files.items():
        mode = path.stat().st_mode & 0o777 if path is not None and path.is_file() else 0
        if mode & 0o077:
            yield f"{option}: {path} is open to others (mode {mode:04o}); chmod 600 closes it"
    short = sum(len(one.key) < SHORT_KEY for one in settings.api_keys())
    if short:
        yield f"{short} API key(s) have fewer than {SHORT_KEY} characters and could be guessed"
