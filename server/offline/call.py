"""What a call of `nv-embed encode` asks for: its input, its output, the prefix of its texts.

Owns every refusal of a call, before a model is loaded. Knows not how a run goes.
"""

from __future__ import annotations

import argparse
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
from server.offline import batch_files, sources, text_files
from server.offline.job import Job, Rows
from server.offline.sources import Kind, Source
from server.offline.text_files import import_parquet
from server.offline.vector_files import FORMATS


@contextmanager
def opened(name: str) -> Iterator[Source]:
    """The input. Raises SettingsError or FileError where it is not there, or is no file."""
    with ExitStack() as stack:
        try:
            source = stack.enter_context(sources.opened(name))
        except FileNotFoundError:
            hint = ""
            if any(sign in name for sign in "*?["):
                hint = " (patterns are not expanded: cat the files | nv-embed encode - -o OUT)"
            raise SettingsError(f"there is no file {name}{hint}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            why = error.strerror if isinstance(error, OSError) else None
            raise SettingsError(f"{name} cannot be read: {why or error}") from None
        yield source


def rows_of(arguments: argparse.Namespace, source: Source) -> Rows[Any]:
    if arguments.openai_batch:
        return Rows(
            lambda: batch_files.read_requests(source),
            key=lambda line: line.key,
            weight=lambda line: line.weight,
        )
    return Rows(
        lambda: text_files.read_texts(source, arguments.field or "text"),
        key=lambda line: line.text.encode(),
        weight=lambda line: len(line.text),
    )


def mode_of(source: Source) -> int:
    """The permissions of what is written: no more than the input's, whose texts vectors tell."""
    mode = source.named.st_mode
    return mode_like(mode if stat.S_ISREG(mode) else None)


def job_of(arguments: argparse.Namespace) -> Job:
    """Raises SettingsError for an output that cannot be, before anything is read."""
    target, is_folder = _target(arguments)
    suffix = f".{arguments.format or 'npy'}" if is_folder else target.suffix.lower()
    if arguments.format and suffix != f".{arguments.format}":
        raise SettingsError(f"--format {arguments.format} contradicts --output {target}")
    if arguments.openai_batch:
        if is_folder and arguments.format is None:
            suffix = ".jsonl"
        if suffix != ".jsonl":
            raise SettingsError("--openai-batch writes JSON lines: name a .jsonl file")
        for name in ("field", "prompt", "instruction", "task", "examples", "input_type"):
            if getattr(arguments, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise SettingsError(f"{flag} and --openai-batch: each request says its own")
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise SettingsError(
            f"--output {target}: write to {known}, or to a folder (with a / behind)"
        )
    if suffix == ".parquet":
        import_parquet()
    said = [arguments.prompt, arguments.instruction, arguments.query_instruction]
    for name, text in (("prefix", "".join(filter(None, said))), ("field", arguments.field or "")):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"the {name} is not UTF-8") from None
    return Job(
        target,
        is_folder,
        FORMATS[suffix],
        arguments.field or "text",
        arguments.truncate,
        arguments.shard_size,
    )


def _target(arguments: argparse.Namespace) -> tuple[Path, bool]:
    """The output, and whether it is a folder: it is one, ends in a slash, or has no suffix."""
    given: str | None = arguments.output
    source = Path(arguments.file)
    if given is None:
        if sources.is_stream(arguments.file) or source.is_relative_to("/dev"):
            raise SettingsError("name the --output: the input is a pipe, which has no name")
        if not source.name:
            raise SettingsError(f"there is no file {arguments.file}")
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


def check(arguments: argparse.Namespace, job: Job, source: Source) -> None:
    """What only the open input tells. Raises SettingsError."""
    if source.kind is Kind.TEXT and arguments.field is not None:
        raise SettingsError(f"--field is for JSON lines and Parquet, and {source.name} is text")
    if arguments.openai_batch and source.kind is not Kind.JSON_LINES:
        raise SettingsError(f"--openai-batch reads JSON lines, and {source.name} is {source.kind}")
    for path in (job.target, job.manifest):
        if path.exists() and os.path.samestat(path.stat(), source.named):
            raise SettingsError(f"--output {path} is the input file")
        if path.exists() and arguments.examples and path.samefile(arguments.examples):
            raise SettingsError(f"--output {path} is the file of --examples")
    folder = job.parts(0).folder
    if folder.is_dir() and _is_within(source, folder):
        raise SettingsError(f"the input lies in {folder}, where this run keeps its shards")


def _is_within(source: Source, folder: Path) -> bool:
    return any(
        os.path.samestat(entry.stat(), source.named)
        for entry in folder.iterdir()
        if entry.is_file()
    )


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
