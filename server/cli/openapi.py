"""`nv-embed openapi`: the document of all routes, as YAML."""

from __future__ import annotations

import argparse
import io
import sys

from server.cli.parsing import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser("openapi", help="print the OpenAPI document as YAML")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    import orjson
    import yaml

    from server.api.openapi import openapi_document

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # it is a file, whatever the terminal
    document = orjson.loads(orjson.dumps(openapi_document()))  # without YAML's aliases
    yaml.safe_dump(document, sys.stdout, sort_keys=False, allow_unicode=True, width=100)
    return 0
