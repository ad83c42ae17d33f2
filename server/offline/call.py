"""What a call of `nv-embed encode` asks for: its input, its output, the prefix of its texts.

Owns every refusal of a call, before a model is loaded. Knows not how a run goes.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.errors import FileError
from model.prompts import Example, Prompt
from model.user_files import kind_of, mode_like, read_text
from server.api import instructions
from server.api.instructions import Defaults, PromptFields
from server.api.json_text import loads
from server.api.parsing import parse_fields
from server.api.schemas import InstructedInput
from server.errors import InvalidRequestError, SettingsError
from server.offline import batch_files, inputs, sources
from server.offline.columns import columns_of
from server.offline.job import Job, Rows
from server.offline.kinds import Kind
from server.offline.parquet_files import import_parquet
from server.offline.part import WHOLE
from server.offline.sources import Source
from server.offline.texts import text_rows
from server.offline.vector_files import COMPRESSED, FORMATS

_OF_TEXTS = ("field", "prompt", "instruction", "task", "examples", "input_type")
"""Options that a batch file has no use for: each request says its own."""


def rows_of(arguments: argparse.Namespace, job: Job) -> Rows[Any]:
    if arguments.openai_batch:
        return Rows(
            batch_files.read_requests, key=lambda line: line.key, weight=lambda line: line.weight
        )
    return text_rows(job.field, job.columns)


def mode_of(sources: Sequence[Source]) -> int:
    """The permissions of what is written: no more than the inputs', whose texts vectors tell."""
    modes = [one.named.st_mode for one in sources if one.named is not None]
    files = [mode for mode in modes if stat.S_ISREG(mode)]
    return mode_like(reduce(and_, (stat.S_IMODE(mode) for mode in files)) if files else None)


def job_of(arguments: argparse.Namespace) -> Job:
    """Raises SettingsError for an output that cannot be, before anything is read."""
    target, is_folder = _target(arguments)
    suffix, compression = _suffix(arguments, target, is_folder)
    if arguments.part is not None and not is_folder:
        raise SettingsError("--part needs a folder as --output, which the parts share: NAME/")
    if arguments.part is not None and any(map(sources.is_stream, arguments.file)):
        raise SettingsError("--part needs files: each part would have to read all of a pipe")
    if arguments.engine == "ray":
        if not is_folder:
            raise SettingsError("--engine ray needs a folder as --output, which all reach: NAME/")
        if any(map(sources.is_stream, arguments.file)):
            raise SettingsError("--engine ray needs files: nobody else could read a pipe")
        if arguments.part is not None:
            raise SettingsError("--part and --engine ray: Ray shares the work itself")
    elif arguments.actors is not None:
        raise SettingsError("--actors is for --engine ray")
    if arguments.openai_batch:
        if is_folder and arguments.format is None:
            suffix = ".jsonl"
        if suffix != ".jsonl":
            raise SettingsError("--openai-batch writes JSON lines: name a .jsonl file")
        if compression is not None and arguments.compression is None:
            raise SettingsError(
                f"--output {target}: --openai-batch does not compress: name it {target.stem}"
            )
        for name in (*_OF_TEXTS, "output_dtype", "compression", "id_field", "keep"):
            if getattr(arguments, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise SettingsError(f"{flag} and --openai-batch: each request says its own")
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise SettingsError(
            f"--output {target}: write to {known}, or to a folder (with a / behind)"
        )
    if suffix == ".parquet" or compression == "zstd":
        import_parquet()
    if compression is not None and compression not in FORMATS[suffix].compressions:
        known = ", ".join(FORMATS[suffix].compressions)
        raise SettingsError(f"--compression {compression}: {suffix} has {known}")
    if suffix == ".npy" and (arguments.id_field is not None or arguments.keep):
        raise SettingsError("--id-field and --keep need --format parquet or jsonl: .npy has none")
    said = [arguments.prompt, arguments.instruction, arguments.query_instruction]
    for name, text in (("prefix", "".join(filter(None, said))), ("field", arguments.field or "")):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"the {name} is not UTF-8") from None
    return Job(
        target,
        is_folder,
        FORMATS[suffix](arguments.output_dtype or "float32", compression),
        arguments.field or "text",
        arguments.truncate,
        arguments.shard_size,
        arguments.on_error == "skip",
        arguments.part or WHOLE,
    )


def _suffix(arguments: argparse.Namespace, target: Path, is_folder: bool) -> tuple[str, str | None]:
    """The format of the output, and how it is compressed where that is said."""
    compression: str | None = arguments.compression
    if is_folder:
        return f".{arguments.format or 'npy'}", compression
    suffix = target.suffix.lower()
    ending = next((name for name, end in COMPRESSED.items() if end == suffix), None)
    if ending is not None:
        suffix = Path(target.stem).suffix.lower()
    if arguments.format and suffix != f".{arguments.format}":
        raise SettingsError(f"--format {arguments.format} contradicts --output {target}")
    if suffix == ".jsonl" and (ending or compression not in (None, "none", ending)):
        if compression not in (None, ending) and compression in COMPRESSED:
            name = f"{target.stem if ending else target.name}{COMPRESSED[compression]}"
            raise SettingsError(f"--compression {compression}: name the --output {name}")
        if compression == "none":
            raise SettingsError(f"--compression none contradicts --output {target}")
        return suffix, ending or compression
    if ending is not None:
        raise SettingsError(f"--output {target}: only JSON lines are compressed as a whole")
    return suffix, compression


def _target(arguments: argparse.Namespace) -> tuple[Path, bool]:
    """The output, and whether it is a folder: it is one, ends in a slash, or has no suffix."""
    given: str | None = arguments.output
    if given is None:
        name = arguments.file[0]
        source = Path(name)
        if sources.is_stream(name) or source.is_relative_to("/dev"):
            raise SettingsError("name the --output: the input is a pipe, which has no name")
        several = len(arguments.file) > 1 or (inputs.has_pattern(name) and not os.path.exists(name))
        if several or inputs.is_url(name) or inputs.folders_of([name]):
            raise SettingsError("name the --output: only that of one local file has a default")
        if not source.name:
            raise SettingsError(f"there is no file {name}")
        if arguments.openai_batch:
            return source.with_name(f"{source.stem}.answers.jsonl"), False
        return source.with_suffix(".npy"), False
    if given in ("", "-"):
        raise SettingsError(f"--output {given or 'is empty'}: name a file, or a folder for shards")
    target = Path(given)
    if not target.parent.is_dir():
        raise SettingsError(f"--output: there is no folder {target.parent}")
    if target.exists() and not (target.is_file() or target.is_dir()):
        what = kind_of(target.stat().st_mode)
        raise SettingsError(f"--output {given} is {what}: vectors need a file, or a folder")
    if target.is_dir() or given.endswith("/") or not target.suffix:
        if target.name.lower() in FORMATS:
            raise SettingsError(f"--output {given}: a suffix without a name")
        if target.is_file():
            raise SettingsError(f"--output {given} is a file, not a folder")
        return (target.resolve() if target.is_symlink() else target), True
    return target, False


def check(arguments: argparse.Namespace, job: Job, sources: Sequence[Source]) -> Job:
    """What only the open inputs tell; returns the job with the columns that are kept. Raises
    SettingsError, InputFileError."""
    kinds = {source.kind for source in sources}
    first = sources[0].name
    if kinds == {Kind.TEXT} and arguments.field is not None:
        raise SettingsError(f"--field is for JSON lines and Parquet, and {first} is text")
    for source in sources:
        if arguments.openai_batch and source.kind is not Kind.JSON_LINES:
            raise SettingsError(
                f"--openai-batch reads JSON lines, and {source.name} is {source.kind}"
            )
    named = {(one.named.st_dev, one.named.st_ino) for one in sources if one.named is not None}
    for path in (job.target, job.manifest, job.skipped):
        if path.exists() and _identity(path) in named:
            raise SettingsError(f"--output {path} is the input file")
        if path.exists() and arguments.examples and path.samefile(arguments.examples):
            raise SettingsError(f"--output {path} is the file of --examples")
    folder = job.parts(0).folder
    if folder.is_dir() and any(
        _identity(entry) in named for entry in folder.iterdir() if entry.is_file()
    ):
        raise SettingsError(f"the input lies in {folder}, where this run keeps its shards")
    _refuse_output_within(arguments.file, job)
    ids = [] if arguments.id_field is None else [arguments.id_field]
    names = tuple(dict.fromkeys([*ids, *(arguments.keep or ())]))
    return replace(job, columns=columns_of(names, arguments.id_field, sources))


def _refuse_output_within(names: Sequence[str], job: Job) -> None:
    """Raises SettingsError for an output that another part would take for an input."""
    # Not where a link of its name leads: it takes that name.
    parent = job.target.parent.resolve()
    above = [_identity(path) for path in (job.target, parent, *parent.parents) if path.exists()]
    for outer in inputs.folders_of(names):
        if _identity(outer) in above:  # whatever it is called: a link, a URL, another mount
            raise SettingsError(
                f"--output {job.target} lies in {outer}, which is read: name one outside of it"
            )
    shard = [job.parts(0).path((0, 0))] if job.is_folder else [job.target]
    for path in (*shard, job.manifest, job.skipped):
        if pattern := inputs.pattern_of(path, names):
            raise SettingsError(
                f"--output {job.target}: {pattern} would match {path}, too: name another"
            )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def defaults_of(arguments: argparse.Namespace, config: ModelConfig) -> Defaults:
    return Defaults.of(
        arguments.query_instruction, arguments.default_input_type, config.family, config.prompts
    )


def examples_of(arguments: argparse.Namespace) -> Sequence[Example]:
    """What the file of --examples holds. Raises SettingsError naming the place that is wrong."""
    if arguments.examples is None:
        return ()
    if arguments.prompt is not None:
        raise SettingsError("--examples and --prompt: write the examples into the prompt")
    path = Path(arguments.examples)
    try:
        fields = {"input": "", "examples": loads(read_text(path).encode())}
        found = parse_fields(InstructedInput, fields).examples
    except FileError as error:
        raise SettingsError(f"--examples: {error}") from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{error}"
        raise SettingsError(f"--examples: {path} cannot be read: {why}") from None
    except InvalidRequestError as error:
        raise SettingsError(f"--examples: {path}: {error.message}") from None
    if not found:
        raise SettingsError(f"--examples: {path} holds no example")
    return [Example(e.instruction, e.query, e.response) for e in found]


def prompt_of(
    arguments: argparse.Namespace, config: ModelConfig, examples: Sequence[Example] = ()
) -> Prompt:
    """What stands around each text. Raises SettingsError for what this model has no place for."""
    defaults = defaults_of(arguments, config)
    asked = PromptFields(
        prompt=arguments.prompt,
        instruction=arguments.instruction,
        task=arguments.task,
        input_type=arguments.input_type,
        examples=examples,
    )
    try:
        prompt = instructions.choose_prompt(defaults, asked).prompt
    except InvalidRequestError as error:
        raise SettingsError(error.message) from None
    return defaults.bare if prompt is None else prompt
