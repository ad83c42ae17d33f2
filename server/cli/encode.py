"""`nv-embed encode`: files of texts to files of vectors, without a server."""

from __future__ import annotations

import argparse
import os
import re

from server.cli.flags import add_flags
from server.cli.options import settle
from server.cli.parsing import Commands, whole_number, words
from server.offline.part import Part
from server.settings import EncodeSettings


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "encode",
        help="embed files of texts",
        description="Embed each line of text files, a field of each JSON line, or a column of "
        "Parquet files, without a server. The output holds one vector per row, in order. Ended by "
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
        "file",
        metavar="FILE",
        nargs="+",
        help="text, JSON lines or Parquet: files, folders, quoted patterns ('in/*.jsonl'), URLs "
        "(s3://bucket/in.jsonl); - reads standard input",
    )
    parser.add_argument(
        "-o",
        "--output",
        help="a file (.npy, .jsonl or .parquet), or a folder for shards: NAME/ (default, of one "
        "FILE: FILE.npy)",
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
        help="texts in a shard, at most, which is no more than 512 times as many bytes of a text "
        "file (default: %(default)s)",
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="do the I-th of N parts of it, on any machine, at any time: all write to one folder, "
        "none waits for another, and the last completes it; repeated, it goes on. I counts from 1, "
        "or from 0 to N-1",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="who does the work: this machine, or the actors of a Ray cluster (RAY_ADDRESS), which "
        "reach input, model and output by the same names (default: %(default)s)",
    )
    parser.add_argument(
        "--actors",
        type=_actors,
        metavar="MIN:MAX",
        help="of --engine ray, each on a GPU, or on --threads cores with --device cpu (default: 1)",
    )
    parser.add_argument(
        "--format",
        choices=("npy", "jsonl", "parquet"),
        help="of the shards in a folder (default: npy)",
    )
    parser.add_argument("--field", help="of JSON, or column of Parquet (default: text)")
    parser.add_argument(
        "--id-field",
        metavar="NAME",
        help="a field that is kept beside each vector, and must be there",
    )
    parser.add_argument(
        "--keep",
        type=words(),
        metavar="NAME,...",
        help="more fields that are kept beside each vector (Parquet, JSON lines)",
    )
    parser.add_argument(
        "--output-dtype",
        choices=("float32", "float16", "int8"),
        help="of the vectors' numbers (default: float32); int8 is round(scale x), as over HTTP",
    )
    parser.add_argument(
        "--compression",
        choices=("zstd", "snappy", "gzip", "none"),
        help="of Parquet (default: snappy) and of shards of JSON lines (gzip, zstd; default: none)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="rows that cannot be embedded: end the run, or list them in skipped.jsonl "
        "(default: %(default)s)",
    )


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


def _part(text: str) -> Part:
    """I/N, counted from 1; 0 is the N-th, for schedulers that count from 0."""
    found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    if found is None or not 0 <= int(found[1]) <= int(found[2]) or not int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, not {text[:64]!r}")
    return Part(int(found[1]) or int(found[2]), int(found[2]))


def _actors(text: str) -> tuple[int, int]:
    """N, or MIN:MAX."""
    found = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"must be N or MIN:MAX, from 1 on, not {text[:64]!r}")
    return least, most


def run(arguments: argparse.Namespace) -> int:
    options = settle(arguments, EncodeSettings)
    if len(options.devices) > 1:
        from server.engine import devices

        arguments.devices = devices.choose(options.devices, os.environ)
    else:
        arguments.devices = [options.one_device()]
    from server.offline import encode

    if arguments.engine == "ray":
        arguments.devices = [options.one_device()]
        from server.ray.actors import Actors

        return encode.run(arguments, Actors)
    return encode.run(arguments)
