"""The command `nv-embed`: the parsers of serve, encode, train, …, and calls of their code.

Owns the options that only one command has; server/settings.py owns the rest, and model/console.py
what becomes of errors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from model import console
from model.errors import did_you_mean
from model.platform import resources
from server import logs, process, settings
from server.errors import SettingsError
from server.settings import EncodeSettings, KeySettings, MachineSettings, ModelSettings, T

logger = logging.getLogger("nv_embed.cli")

_MOST = 10_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call."""
    process.open_standard_streams()
    resources.let_waiting_threads_sleep()  # here and in the workers, which inherit the environment

    def command() -> int:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        status: int = arguments.run(arguments)
        return status

    return console.run("nv-embed", command, (SettingsError,))


class _Parser(argparse.ArgumentParser):
    """Its errors are SettingsErrors of one line, which name the nearest of the known values."""

    def error(self, message: str) -> NoReturn:
        if found := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(found[1], re.findall(r"[\w.-]+", found[2]))
        raise SettingsError(f"{message.removeprefix('argument ')} ({self.prog} --help)")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises SettingsError for an unknown flag, with the nearest known one, and an empty value."""
    for place, item in enumerate(argv):
        flag, equals, value = item.partition("=")
        if not item.strip() or (flag.startswith("--") and equals and not value.strip()):
            before = argv[place - 1] if place else ""
            name = flag if equals else before if before.startswith("-") else f"argument {place + 1}"
            raise SettingsError(f"{name}: {settings.EMPTY}")
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = re.findall(r"--[a-z-]+", arguments.parser.format_help())
        hint = did_you_mean(unknown[0].partition("=")[0], flags)
        raise SettingsError(f"unrecognized argument {unknown[0]}{hint}")
    return arguments


def _whole(least: int, most: int = _MOST) -> Callable[[str], int]:
    """A whole number of an option, within bounds."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text[:64]!r}") from None
        if not least <= number <= most:
            bound = f"at least {least}" if number < least else f"at most {most}"
            raise argparse.ArgumentTypeError(f"must be {bound}, not {text[:64]}")
        return number

    return read


def _part(text: str) -> float:
    """A number above 0 and at most 1."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) <= 1 and math.isfinite(number):
            return number
    raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, not {text[:64]!r}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="nv-embed",
        description="Serve NV-Embed behind OpenAI's embeddings API, or use it from files.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=version("nv-embed-server"))
    parser.set_defaults(run=_help, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        help="start the server",
        description="Start the server. Every option is also an environment variable (in brackets) "
        "and a line of the --config file; a flag wins over the environment, that over the file.",
        epilog="Example: nv-embed serve --model nvidia/NV-Embed-v2 --port 8000",
    )
    settings.add_flags(serve)
    serve.set_defaults(run=_serve, parser=serve)

    encode = commands.add_parser(
        "encode",
        help="embed a file of texts",
        description="Embed each line of a text file, a field of each JSON line, or a column of a "
        "Parquet file, without a server. The output holds one vector per row, in order. Ended by "
        "Ctrl-C or worse, --resume goes on: half a minute of work is lost at most. Exit status: 0 "
        "when all is written, 1 when it failed, 2 for a wrong call, 130 after Ctrl-C.",
        epilog="Example: nv-embed encode questions.txt -o questions.npy --model MODEL --task NQ",
    )
    _add_encode_arguments(encode)
    encode.set_defaults(run=_encode, parser=encode)

    verify = commands.add_parser(
        "verify",
        help="prove that a checkpoint gives the authors' vectors here",
        description="Check a checkpoint on this machine against the values published with it, and "
        "measure. Prints a table and, last, a line of JSON. The exit status is 1 if a check fails.",
    )
    settings.add_flags(verify, ModelSettings)
    verify.add_argument(
        "--golden",
        type=Path,
        help="JSON of the authors' outputs (default: golden.json in the checkpoint's folder)",
    )
    verify.set_defaults(run=_verify, parser=verify)

    gpu_check = commands.add_parser(
        "gpu-check",
        help="prove parity and measure on this GPU, and write a report",
        description="Compare every precision with float32 on this GPU, time the model, its parts "
        "and a real server, and write a JSON report, which also holds what failed. Below ten "
        "minutes on an H100. Exit status 1 when something is outside tolerance or failed.",
        epilog="Example: nv-embed gpu-check --model nvidia/NV-Embed-v2",
    )
    settings.add_flags(gpu_check, ModelSettings)
    gpu_check.add_argument(
        "--quick",
        action="store_true",
        help="below two minutes: one length of texts, without int8 and the server",
    )
    gpu_check.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu-check"),
        metavar="FOLDER",
        help="where the report goes (default: %(default)s)",
    )
    gpu_check.set_defaults(run=_gpu_check, parser=gpu_check)

    _add_training_commands(commands)

    openapi = commands.add_parser("openapi", help="print the OpenAPI document as YAML")
    openapi.set_defaults(run=_openapi, parser=openapi)
    return parser


def _help(arguments: argparse.Namespace) -> int:
    arguments.parser.print_help(sys.stderr)
    return 2


def _settle(arguments: argparse.Namespace, kind: type[T]) -> T:
    """What flags, environment and file say of the options of `kind`; `arguments` gets it, too.

    Raises SettingsError.
    """
    names = {*kind.model_fields, "config"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    options = settings.load_as(kind, given, os.environ)
    logs.configure(options.log_format, options.log_level)
    vars(arguments).update({name: getattr(options, name) for name in kind.model_fields})
    return options


def _serve(arguments: argparse.Namespace) -> int:
    options = _settle(arguments, settings.Settings)
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


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
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
        type=_whole(1),
        default=8192,
        help="texts in a shard, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=("npy", "jsonl", "parquet"),
        help="of the shards in a folder (default: npy)",
    )
    parser.add_argument("--field", help="of JSON, or column of Parquet (default: text)")
    prefix = parser.add_mutually_exclusive_group()
    prefix.add_argument("--prompt", help="prefix of each text, verbatim")
    prefix.add_argument("--instruction", help="task description: Instruct: ... Query: ...")
    prefix.add_argument("--task", help="name of a task, for instance NQ or STS")
    parser.add_argument(
        "--input-type",
        choices=("query", "passage"),
        help="the side of --task (default: query); alone, query means question answering",
    )
    settings.add_flags(parser, EncodeSettings)


def _encode(arguments: argparse.Namespace) -> int:
    arguments.device = _settle(arguments, EncodeSettings).one_device()
    from server.offline import encode

    return encode.run(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    arguments.device = _settle(arguments, ModelSettings).one_device()
    from model.verify import command

    return command.run(arguments)


def _gpu_check(arguments: argparse.Namespace) -> int:
    arguments.device = _settle(arguments, ModelSettings).one_device()
    from server import gpu_check

    return gpu_check.run(arguments)


def _add_training_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    """train, mine and evaluate: they need the extra `training` (model/training)."""
    train = commands.add_parser(
        "train",
        help="train a model by the two-stage recipe",
        description="Run the training that a settings file describes, or go on with it where it "
        "stopped. The result is a checkpoint in the official layout.",
        epilog="Example: nv-embed train stage1.json -o runs/stage1",
    )
    train.add_argument("settings", type=Path, metavar="SETTINGS", help="JSON of one run")
    train.add_argument("-o", "--out", type=Path, required=True, help="the run's folder")
    train.add_argument(
        "--base", type=Path, help="where the settings' relative paths start (default: beside them)"
    )
    settings.add_flags(train, MachineSettings)  # what else there is stands in SETTINGS
    train.set_defaults(run=_train, parser=train)

    mine = commands.add_parser(
        "mine",
        help="find hard negatives for training examples",
        description="Give each example hard negatives: positives of other examples that a teacher "
        "finds close to the query, but clearly less close than the example's own positive. Those "
        "nearer than the threshold are left out, for they may answer the query as well. The "
        "teacher is whichever model is named below; the larger, the better the negatives. Old "
        "negatives are replaced; a bad line stops the command with its number.",
        epilog="Example: nv-embed mine pairs.jsonl -o mined.jsonl --teacher default",
    )
    mine.add_argument(
        "examples",
        type=Path,
        metavar="FILE",
        help="JSON lines of query, positive and, if wanted, task (model/training/README.md)",
    )
    mine.add_argument("-o", "--out", type=Path, required=True, help="JSON lines with negatives")
    mine.add_argument(
        "--count",
        type=_whole(1, 1000),
        default=7,
        help="negatives of each example, fewer where there are no more (default: %(default)s, as "
        "in the paper)",
    )
    mine.add_argument(
        "--threshold",
        type=_part,
        default=0.95,
        help="a negative's score stays below this times the positive's; smaller is safer and "
        "easier (default: %(default)s, as in the paper)",
    )
    _add_embedder_arguments(mine)
    mine.set_defaults(run=_mine, parser=mine)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a model on sets from files, or on mteb's tasks",
        description="Score embeddings: Spearman (STS); nDCG@10, MRR@10 and recall@100 (retrieval); "
        "kNN and logistic regression (classification); V-measure (clustering). Each option may be "
        "repeated. Prints a table, each score with its 95 %% interval (bootstrap), and, last, a "
        "line of JSON. The instruction of a set stands "
        "behind its path: PATH=TASK, TASK being a name that GET /v1/instructions lists (NQ, STS, "
        "Banking77 and others, in any case), a description in words, or nothing for none. Without "
        "it: NQ's for retrieval, STS's for STS, and mteb's general ones for classification "
        "(Classify user passages.) and clustering (Identify categories in user passages.). "
        "Queries alone get it in retrieval, all texts elsewhere.",
        epilog="Example: nv-embed evaluate --sts sts-dev.csv --retrieval cisi/=nq "
        "--classification banking77/train.csv=banking77",
    )
    for name, kind in (
        ("sts", "STS Benchmark's columns, or JSON lines of first, second and score"),
        ("retrieval", "folder of corpus.jsonl, queries.jsonl, qrels.tsv, or a SMART collection"),
        ("classification", "CSV of text and category or label, and perhaps split"),
        ("clustering", "likewise; the test part is scored"),
    ):
        evaluate.add_argument(
            f"--{name}", action="append", default=[], metavar="PATH[=TASK]", help=kind
        )
    evaluate.add_argument(
        "--mteb",
        nargs="+",
        action="extend",
        default=[],
        metavar="TASK",
        help="mteb's tasks by name, for instance STS12 SciFact; their data are downloaded. "
        "Instructions: the authors' where there are any, else mteb's (extra mteb)",
    )
    evaluate.add_argument(
        "--results",
        type=Path,
        default=Path("mteb-results"),
        help="folder for the files that mteb writes (default: %(default)s)",
    )
    evaluate.add_argument(
        "--no-instructions", dest="instructions", action="store_false", help="embed texts bare"
    )
    evaluate.add_argument("--bm25", action="store_true", help="the lexical baseline instead")
    evaluate.add_argument(
        "--case",
        choices=("lower", "upper", "title"),
        help="retrieval's queries in this case: how much a model minds",
    )
    evaluate.add_argument(
        "--items",
        type=Path,
        metavar="FILE",
        help="keep what each query, pair or text scored, for --against of another run",
    )
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="another run's --items: prints the differences, with their intervals (paired)",
    )
    evaluate.add_argument(
        "--projection",
        type=Path,
        metavar="FILE",
        help="map the vectors by this file of `initialise` first: with --teacher, the most that "
        "distillation can reach",
    )
    evaluate.add_argument(
        "--dimensions",
        type=_whole(1, 65_536),
        metavar="N",
        help="score the first N numbers of each vector, made to length 1 again",
    )
    _add_embedder_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate, parser=evaluate)


def _add_embedder_arguments(parser: argparse.ArgumentParser) -> None:
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
    for name, kind in (("", "of the server at --url"), ("-file", "file that holds it")):
        parser.add_argument(
            f"--api-key{name}",
            default=argparse.SUPPRESS,
            metavar="FILE" if name else "KEY",
            help=f"{kind} [NV_EMBED_API_KEY{name.upper().replace('-', '_')}]",
        )
    settings.add_flags(parser, ModelSettings, but="model")
    parser.add_argument(
        "--max-tokens",
        type=_whole(3, 32_768),
        default=512,
        help="of a text, the rest is cut (default: %(default)s; a server at --url cuts at its own "
        "limit)",
    )


def _train(arguments: argparse.Namespace) -> int:
    arguments.device = _settle(arguments, MachineSettings).one_device()
    from model.training import commands

    return commands.train(arguments)


def _mine(arguments: argparse.Namespace) -> int:
    _settle_embedder(arguments)
    from model.training import commands

    return commands.mine_negatives(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    _settle_embedder(arguments)
    from model.training import commands

    return commands.evaluate(arguments)


def _settle_embedder(arguments: argparse.Namespace) -> None:
    options = _settle(arguments, KeySettings)
    arguments.device = options.one_device()
    keys = options.api_keys() if arguments.url else []
    arguments.api_key = keys[0].decode() if keys else None


def _openapi(arguments: argparse.Namespace) -> int:
    import orjson
    import yaml

    from server.api.openapi import openapi_document

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # it is a file, whatever the terminal
    document = orjson.loads(orjson.dumps(openapi_document()))  # without YAML's aliases
    yaml.safe_dump(document, sys.stdout, sort_keys=False, allow_unicode=True, width=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
