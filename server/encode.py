"""The command `nv-embed encode`: from its arguments to a job, its encoder and an exit status.

Knows neither how rows are read nor how shards are kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.batch import BatchLimits, RunnerOptions
from model.hub import ModelSource, locate
from model.tokenizer import NVEmbedTokenizer
from server import batch_files, bulk, instructions, text_files
from server.batch_files import BatchAnswers
from server.errors import InvalidRequestError, SettingsError
from server.inputs import InputTokenizer
from server.instructions import Defaults
from server.names import ServedNames
from server.text_files import InputFileError
from server.vector_files import FORMATS
from server.worker import load_factory

if TYPE_CHECKING:
    from model.encoder import Encoder


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status. Raises SettingsError or ModelError for a wrong call."""
    job = _job(arguments)
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
    if arguments.openai_batch:
        return batch_files.read_requests(arguments.file)
    return text_files.read_texts(arguments.file, arguments.field)


def _batch_answers(
    arguments: argparse.Namespace, encoder: Encoder, model: ModelSource
) -> BatchAnswers:
    return BatchAnswers(
        encoder,
        InputTokenizer(encoder.tokenizer, encoder.max_tokens, arguments.truncate),
        ServedNames(model.model_id),
        _defaults(arguments),
    )


def _defaults(arguments: argparse.Namespace) -> Defaults:
    return Defaults.of(arguments.query_instruction, arguments.default_input_type)


def _job(arguments: argparse.Namespace) -> bulk.Job:
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
    prefix = _prefix(arguments) or ""
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
    from model.encoder import Encoder

    path = locate(arguments.model, revision=arguments.revision, offline=arguments.offline).path
    runner = load_factory(arguments.runner)(RunnerOptions(path=str(path)))
    limits = BatchLimits(arguments.max_batch_tokens or 1024, max_seqs=256)
    return Encoder.of(NVEmbedTokenizer.from_dir(path), runner, limits, max_tokens=32_768)


def _prefix(arguments: argparse.Namespace) -> str | None:
    try:
        return instructions.choose_prefix(
            _defaults(arguments),
            prompt=arguments.prompt,
            instruction=arguments.instruction,
            task=arguments.task,
            input_type=arguments.input_type,
        )
    except InvalidRequestError as error:
        raise SettingsError(error.message) from None
