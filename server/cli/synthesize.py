"""`nv-embed synthesize`: training examples from a chat model. Needs the extra `training`."""

from __future__ import annotations

import argparse
from pathlib import Path

from server.cli.options import add_embedder, add_key, settle_embedder
from server.cli.parsing import Commands, number, whole_number, words
from server.settings import ChatSettings

KINDS = ("short", "long", "match")


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "synthesize",
        help="have a chat model write training examples",
        description="Ask a chat model, behind any server that speaks OpenAI's chat completions, "
        "for tasks, and then for a query, a positive and hard negatives of each. Every answer is "
        "kept in FILE.answers as soon as it comes; the same command goes on where it stopped. Of "
        "what was asked for, repeated queries are dropped, and so is an example whose query does "
        "not lead back to its positive: an embedding model, which --model, --teacher or --url "
        "names, has to place it above its own negatives and among the first of all positives of "
        "its kind. Prints, last, a line of JSON with the counts.",
        epilog="Example: nv-embed synthesize -o examples.jsonl --chat-url http://host:8001 "
        "--tasks 100 --examples-per-task 2",
    )
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="JSON lines, for train"
    )
    _add_chat(parser)
    _add_contents(parser)
    parser.add_argument(
        "--keep-top",
        type=whole_number(1),
        default=10,
        metavar="K",
        help="the positive has to be among the K nearest of all positives of its kind (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--no-filter",
        dest="filter",
        action="store_false",
        help="keep examples whatever an embedding model says of them; without this option the "
        "same command filters them later",
    )
    add_embedder(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    """Who is asked, and how."""
    parser.add_argument(
        "--chat-url",
        required=True,
        metavar="URL",
        help="address of the server that is asked, for instance http://host:8001",
    )
    parser.add_argument(
        "--chat-model",
        metavar="NAME",
        help="the model there (default: the first that the server names)",
    )
    add_key(parser, "--chat-api-key", "--chat-url")
    parser.add_argument(
        "--concurrency",
        type=whole_number(1, 512),
        default=8,
        help="requests at a time (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=number(0, 2),
        default=1.0,
        help="of the model's choice of words (default: %(default)s)",
    )
    parser.add_argument(
        "--max-retries",
        type=whole_number(0, 100),
        default=3,
        metavar="N",
        help="a malformed answer is asked for again at most so many times (default: %(default)s)",
    )


def _add_contents(parser: argparse.ArgumentParser) -> None:
    """What is asked for."""
    parser.add_argument(
        "--tasks",
        type=whole_number(1),
        default=100,
        metavar="N",
        help="tasks of each kind (default: %(default)s)",
    )
    parser.add_argument(
        "--examples-per-task",
        type=whole_number(1, 1000),
        default=2,
        metavar="N",
        help="examples of each task (default: %(default)s, as in the paper)",
    )
    parser.add_argument(
        "--kinds",
        type=words(KINDS),
        default=("short", "long"),
        help="short: a short query finds a long text (retrieval); long: a long text finds its "
        "label (classification); match: two short texts (default: short,long)",
    )
    parser.add_argument(
        "--languages",
        type=words(),
        default=("English",),
        help="of the texts, by their English names: English,German (default: English, as in the "
        "paper); each example draws one",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, 2**31 - 1),
        default=1,
        help="of what is drawn for the prompts (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    keys = settle_embedder(arguments, ChatSettings).chat_api_keys()
    arguments.chat_api_key = keys[0].decode() if keys else None
    from model.training import commands

    return commands.synthesize(arguments)
