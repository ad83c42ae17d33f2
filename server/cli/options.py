"""Groups of options that several commands have, and what their values come to."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TypeVar

from server import configuration, logs
from server.cli.flags import add_flags
from server.cli.parsing import whole_number
from server.settings import ENV_PREFIX, KeySettings, ModelSettings, SettingsT

logger = logging.getLogger("nv_embed.cli")

KeySettingsT = TypeVar("KeySettingsT", bound=KeySettings)


def settle(arguments: argparse.Namespace, kind: type[SettingsT]) -> SettingsT:
    """What flags, environment and file say of the options of `kind`; `arguments` gets it, too.

    Raises SettingsError.
    """
    names = {*kind.model_fields, "config"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    options = configuration.load_as(kind, given, os.environ)
    logs.configure(options.log_format, options.log_level)
    if ignored := configuration.service_links(os.environ):
        logger.warning(
            "ignored, for Kubernetes makes them of a Service's name (enableServiceLinks: false "
            "spares them): %s",
            ", ".join(sorted(ignored)),
        )
    vars(arguments).update({name: getattr(options, name) for name in kind.model_fields})
    return options


def add_embedder(parser: argparse.ArgumentParser) -> None:
    """What makes the vectors: a checkpoint, a sentence-transformer or a running server."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        help="checkpoint folder or hub id (default: the shipped model)",
    )
    which.add_argument(
        "--teacher", help="folder of a sentence-transformers model; 'default': all-MiniLM-L6-v2"
    )
    which.add_argument("--url", help="address of a running server, for instance http://host:8000")
    add_key(parser, "--api-key", "--url")
    add_flags(parser, ModelSettings, leave_out="model")
    parser.add_argument(
        "--max-tokens",
        type=whole_number(3, 32_768),
        default=512,
        help="of a text, the rest is cut (default: %(default)s; a server at --url cuts at its own "
        "limit)",
    )


def add_key(parser: argparse.ArgumentParser, flag: str, server: str) -> None:
    """The key of another server, itself or in a file; server: the flag of its address."""
    for suffix, what in (("", f"of the server at {server}"), ("-file", "file that holds it")):
        variable = f"{ENV_PREFIX}{(flag + suffix).strip('-').replace('-', '_').upper()}"
        parser.add_argument(
            f"{flag}{suffix}",
            default=argparse.SUPPRESS,
            metavar="FILE" if suffix else "KEY",
            help=f"{what} [{variable}]",
        )


def settle_embedder(arguments: argparse.Namespace, kind: type[KeySettingsT]) -> KeySettingsT:
    """As `settle`; `arguments` gets the device and one key, too."""
    options = settle(arguments, kind)
    arguments.device = options.one_device()
    keys = options.api_keys() if arguments.url else []
    arguments.api_key = keys[0].key.decode() if keys else None
    return options
