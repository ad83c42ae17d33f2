"""`nv-embed encode`: a file of texts to a file of vectors, without a server."""

from __future__ import annotations

import argparse

from server.cli.flags import add_flags
from server.cli.options import settle
from server.cli.parsing import Commands, whole_number
from server.settings import EncodeSettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "encode",
        help="embed a file of texts",
        description="Embed each line of a text file, a field of each JSON line, or a column of a "
        "Parquet file, without a server. The output holds one vector per row, in order. Ended by "
        "Ctrl-C or worse, --resume goes on: half a minute of work is lost at most. Exit status: 0 "
        "when all is written, 1 when it failed, 2 for a wrong call, 130 after Ctrl-C.",
        epilog="Example: nv-embed encode questions.txt -o questions.npy --model MODEL --task NQ",
    )
    _add_files(parser)
    _add_prefix(parser)
    add_flags(parser, EncodeSettings)
    parser.set_defaults(run=run, parser=parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="text, JSON lines or Parquet; - reads standard input"
    )
    parser.add_argument(
        "-o",
        "--output",
        help="a file (.npy, .jsonl or .parquet), or a folder for shards: NAME/ (default: FILE.npy)",
    )
    parser.add_argument(
        "--openai-batch",
        action="store_true",
        help="FILE is an OpenAI batch file: requests to /v1/embeddings, each with a custom_id",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on where an earlier run of the same was ended"
    )
    parser.add_argument(
        "--shard-size",
        type=whole_number(1),
        default=8192,
        help="texts in a shard, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=("npy", "jsonl", "parquet"),
        help="of the shards in a folder (default: npy)",
    )
    parser.add_argument("--field", help="of JSON, or column of Parquet (default: text)")


def _add_prefix(parser: argparse.ArgumentParser) -> None:
    prefix = parser.add_mutually_exclusive_group()
    prefix.add_argument("--prompt", help="prefix of each text, verbatim")
    prefix.add_argument("--instruction", help="task description: Instruct: ... Query: ...")
    prefix.add_argument("--task", help="name of a task, for instance NQ or STS")
    parser.add_argument(
        "--examples",
        metavar="FILE",
        help="queries of the task with their answers, before the prefix (bge-en-icl only): a JSON "
        'list of {"instruct": ..., "query": ..., "response": ...}',
    )
    parser.add_argument(
        "--input-type",
        choices=("query", "passage"),
        help="the side of --task (default: query); alone, query means question answering",
    )


def run(arguments: argparse.Namespace) -> int:
    arguments.device = settle(arguments, EncodeSettings).one_device()
    from server.offline import encode

    return encode.run(arguments)
