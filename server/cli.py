"""The command `nv-embed`: serve, encode, verify, train, … Arguments and messages, no more."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import ModelError
from server import logs, process, settings
from server.errors import SettingsError

if TYPE_CHECKING:
    from model.encoder import Encoder
    from model.hub import ModelSource
    from server import bulk
    from server.batch_files import BatchAnswers


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a failure, 2 for a wrong call."""
    process.open_standard_streams()
    try:
        arguments = _parse(argv)
        status: int = arguments.run(arguments)
    except (SettingsError, ModelError) as error:
        print(f"nv-embed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises SettingsError for an unknown flag, with the nearest known one."""
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = re.findall(r"--[a-z-]+", arguments.parser.format_help())
        hint = settings.did_you_mean(unknown[0], flags)
        raise SettingsError(f"unrecognized argument {unknown[0]}{hint}")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nv-embed",
        description="Serve NV-Embed behind OpenAI's embeddings API, or use it from files.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=version("nv-embed-server"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
        "Ctrl-C or worse, --resume goes on: at most one shard is lost.",
        epilog="Example: nv-embed encode questions.txt -o questions.npy --model MODEL --task NQ",
    )
    _add_encode_arguments(encode)
    encode.set_defaults(run=_encode, parser=encode)

    verify = commands.add_parser(
        "verify",
        help="prove that a checkpoint gives the authors' vectors here",
        description="Check a checkpoint on this machine against the values published with it, and "
        "measure. Prints a table and, last, a line of JSON; exit status 1 outside tolerance.",
    )
    _add_model_arguments(verify)
    verify.add_argument(
        "--golden",
        type=Path,
        help="JSON of the authors' outputs (default: golden.json in the checkpoint's folder)",
    )
    verify.set_defaults(run=_verify, parser=verify)

    _add_training_commands(commands)

    openapi = commands.add_parser("openapi", help="print the OpenAPI document as YAML")
    openapi.set_defaults(run=_openapi, parser=openapi)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "parser")}
    options = settings.load(given, os.environ)
    logs.configure(options.log_format, options.log_level)
    from model.hub import locate
    from server import lifecycle

    # Until lifecycle drains on it: a container's first process ignores SIGTERM by default, and a
    # download takes minutes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    source = locate(options.model, revision=options.revision, offline=options.offline)
    return lifecycle.run(options, source)


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    from model.tokenizer import Truncation

    parser.add_argument("file", type=Path, metavar="FILE", help="text, JSON lines or .parquet")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="a file (.npy, .jsonl or .parquet), or a folder for shards (default: FILE.npy)",
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
        type=int,
        default=8192,
        help="texts that are written at once, and lost at most (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        default="npy",
        choices=("npy", "jsonl", "parquet"),
        help="of the shards in a folder (default: %(default)s)",
    )
    parser.add_argument("--field", default="text", help="of JSON, or column (default: %(default)s)")
    prefix = parser.add_mutually_exclusive_group()
    prefix.add_argument("--prompt", help="prefix of each text, verbatim")
    prefix.add_argument("--instruction", help="task description: Instruct: … Query: …")
    prefix.add_argument("--task", help="name of a task, for instance NQ or STS")
    parser.add_argument(
        "--input-type",
        choices=("query", "passage"),
        help="the side of --task (default: query); alone, query means question answering",
    )
    parser.add_argument("--truncate", type=Truncation, choices=list(Truncation), default="none")
    parser.add_argument("--max-batch-tokens", type=int, help="tokens in one forward")
    parser.add_argument("--runner", help=argparse.SUPPRESS)
    _add_model_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it runs: for the commands without a server."""
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the shipped model)")
    parser.add_argument("--revision", help="commit, tag or branch of a hub id")
    parser.add_argument("--offline", action="store_true", help="use the local cache only")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--quantization", default="none", help="none, int8, int8-dynamic or float8")
    parser.add_argument("--attention", default="auto", help="auto or a kernel's name")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")


def _encode(arguments: argparse.Namespace) -> int:
    logs.configure("text", "info")
    from model.hub import locate
    from server import bulk
    from server.text_files import InputFileError

    job = _encode_job(arguments)
    model = locate(arguments.model, revision=arguments.revision, offline=arguments.offline)
    how = {name: getattr(arguments, name) for name in ("dtype", "quantization")}
    try:
        manifest = bulk.describe(job, model, how, _rows(arguments))
        if bulk.prepare(job, manifest, resume=arguments.resume):
            encoder = _encoder(arguments)
            if arguments.openai_batch:
                answers = _batch_answers(arguments, encoder, model)
                bulk.run(job, manifest, _rows(arguments), answers.write)
            else:
                bulk.run(job, manifest, _rows(arguments), bulk.text_shards(job, encoder))
    except (InputFileError, bulk.ResumeError) as error:
        print(f"nv-embed encode: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nnv-embed encode: interrupted; the same command with --resume goes on")
        return 130
    print(f"{manifest['input']['rows']} rows in {job.target}")
    return 0


def _rows(arguments: argparse.Namespace) -> Iterator[Any]:
    """The rows of the input, from its beginning."""
    from server import batch_files, text_files

    if arguments.openai_batch:
        return batch_files.read_requests(arguments.file)
    return text_files.read_texts(arguments.file, arguments.field)


def _batch_answers(
    arguments: argparse.Namespace, encoder: Encoder, model: ModelSource
) -> BatchAnswers:
    from server.batch_files import BatchAnswers
    from server.inputs import InputTokenizer
    from server.instructions import Defaults
    from server.names import ServedNames

    return BatchAnswers(
        encoder,
        InputTokenizer(encoder.tokenizer, encoder.max_tokens, arguments.truncate),
        ServedNames(model.model_id),
        Defaults(settings.Settings().query_instruction),
    )


def _encode_job(arguments: argparse.Namespace) -> bulk.Job:
    from server import bulk
    from server.vector_files import FORMATS

    source: Path = arguments.file
    target: Path = arguments.output or source.with_suffix(".npy")
    if arguments.openai_batch and arguments.output is None:
        target = source.with_name(f"{source.stem}.answers.jsonl")
    suffix = target.suffix or f".{arguments.format}"
    if arguments.openai_batch and suffix != ".jsonl":
        raise SettingsError("--openai-batch writes JSON lines: name a .jsonl file")
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise SettingsError(f"--output {target}: write to {known}, or to a folder")
    if not source.is_file():
        raise SettingsError(f"there is no file {source}")
    if not target.parent.is_dir():
        raise SettingsError(f"--output: there is no folder {target.parent}")
    if target.exists() and target.samefile(source):
        raise SettingsError(f"--output {target} is the input file")
    prefix = _encode_prefix(arguments) or ""
    return bulk.Job(
        source,
        target,
        arguments.field,
        prefix,
        arguments.truncate,
        arguments.shard_size,
        FORMATS[suffix],
    )


def _encoder(arguments: argparse.Namespace) -> Encoder:
    from model.encoder import Encoder

    if arguments.runner:
        return _encoder_around(arguments)
    return Encoder(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        threads=arguments.threads,
        max_batch_tokens=arguments.max_batch_tokens,
    )


def _encoder_around(arguments: argparse.Namespace) -> Encoder:
    """With another runner than the model, for tests and benchmarks."""
    from model.batch import BatchLimits, RunnerOptions
    from model.encoder import Encoder
    from model.hub import locate
    from model.tokenizer import NVEmbedTokenizer
    from server.worker import load_factory

    path = locate(arguments.model, revision=arguments.revision, offline=arguments.offline).path
    runner = load_factory(arguments.runner)(RunnerOptions(path=str(path)))
    limits = BatchLimits(arguments.max_batch_tokens or 1024, max_seqs=256)
    return Encoder.of(NVEmbedTokenizer.from_dir(path), runner, limits, max_tokens=32_768)


def _encode_prefix(arguments: argparse.Namespace) -> str | None:
    from server import instructions
    from server.errors import InvalidRequestError

    try:
        return instructions.choose_prefix(
            instructions.Defaults(settings.Settings().query_instruction),
            prompt=arguments.prompt,
            instruction=arguments.instruction,
            task=arguments.task,
            input_type=arguments.input_type,
        )
    except InvalidRequestError as error:
        raise SettingsError(error.message) from None


def _verify(arguments: argparse.Namespace) -> int:
    from model import verify

    return verify.run(arguments)


def _add_training_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    train.add_argument("--threads", type=int, help="CPU threads, in place of the settings'")
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
        type=int,
        default=7,
        help="negatives of each example, fewer where there are no more (default: %(default)s, as "
        "in the paper)",
    )
    mine.add_argument(
        "--threshold",
        type=float,
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
        "repeated. Prints a table and, last, a line of JSON. The instruction of a set stands "
        "behind its path: PATH=TASK, TASK being a name that GET /v1/instructions lists (NQ, STS, "
        "Banking77, … in any case), a description in words, or nothing for none. Without it: NQ's "
        "for retrieval, STS's for STS, and mteb's general ones for classification (Classify user "
        "passages.) and clustering (Identify categories in user passages.). Queries alone get it "
        "in retrieval, all texts elsewhere.",
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
    _add_embedder_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate, parser=evaluate)


def _add_embedder_arguments(parser: argparse.ArgumentParser) -> None:
    """What makes the vectors: a checkpoint, a sentence-transformer or a running server."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="checkpoint folder or hub id (default: the shipped model)")
    which.add_argument(
        "--teacher", help="folder of a sentence-transformers model; 'default': all-MiniLM-L6-v2"
    )
    which.add_argument("--url", help="address of a running server, for instance http://host:8000")
    parser.add_argument("--api-key", help="of the server at --url [NV_EMBED_API_KEY]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--quantization", default="none", help="none, int8, int8-dynamic or float8")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="of a text, the rest is cut (default: %(default)s; a server at --url cuts at its own "
        "limit)",
    )


def _train(arguments: argparse.Namespace) -> int:
    logs.configure("text", "info")
    from model.training import commands

    return commands.train(arguments)


def _mine(arguments: argparse.Namespace) -> int:
    from model.training import commands

    return commands.mine_negatives(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from model.training import commands

    return commands.evaluate(arguments)


def _openapi(arguments: argparse.Namespace) -> int:
    import orjson
    import yaml

    from server.app import openapi_document

    document = orjson.loads(orjson.dumps(openapi_document()))  # without YAML's aliases
    yaml.safe_dump(document, sys.stdout, sort_keys=False, allow_unicode=True, width=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
