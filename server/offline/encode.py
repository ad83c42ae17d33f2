"""The command `nv-embed encode`: from its arguments to a run, its encoder and an exit status.

Knows neither how rows are read nor how shards are kept.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from model.batch import BatchLimits, RunnerOptions
from model.fitting import is_out_of_memory
from model.hub import ModelSource, locate
from model.platform import resources
from model.tokenizer import NVEmbedTokenizer
from model.user_files import kind_of
from server.api import instructions
from server.api.instructions import Defaults
from server.api.names import ServedNames
from server.engine.inputs import InputTokenizer
from server.engine.worker import load_factory
from server.errors import InvalidRequestError, SettingsError
from server.offline import batch_files, bulk, text_files
from server.offline.batch_files import BatchAnswers
from server.offline.job import Job, Rows, Tokenize
from server.offline.parts import OutputError
from server.offline.text_files import InputFileError, Kind, Source, import_parquet
from server.offline.texts import texts
from server.offline.vector_files import FORMATS

if TYPE_CHECKING:
    from model.encoder import Encoder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Stopped(BaseException):
    """SIGTERM or SIGHUP: as Ctrl-C, with a status of its own."""

    def __init__(self, signum: int) -> None:
        self.status = 128 + signum


def run(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 0, 1 for a failure, 128 + N when signal N ended the run.

    Raises SettingsError or ModelError for a wrong call.
    """
    rows_kept = 0
    try:
        job = _job(arguments)
        with _stoppable(), _opened(arguments.file) as source:
            _check(arguments, job, source)
            mode = _mode_of(source)
            todo = bulk.Run(job, source, _rows(arguments, source), mode)
            try:
                done = _run(arguments, job, source, todo)
            finally:
                rows_kept = todo.rows_kept
    except (InputFileError, OutputError) as error:
        return _failed(f"{error}")
    except (KeyboardInterrupt, _Stopped) as stop:
        kept = f"{rows_kept} rows are kept; " if rows_kept else ""
        _failed(f"interrupted; {kept}the same command with --resume goes on")
        return stop.status if isinstance(stop, _Stopped) else 130
    except Exception as error:
        if is_out_of_memory(error):
            return _failed(f"out of memory ({error or 'MemoryError'}); {_RESUME}")
        if isinstance(error, OSError):
            return _failed(_why(error, arguments))
        raise
    print(f"{todo.num_rows} rows in {job.target}{' (complete already)' if done else ''}")
    return 0


_RESUME = "then the same command with --resume goes on"


def _failed(message: str) -> int:
    print(f"nv-embed encode: {message}", file=sys.stderr)
    return 1


def _why(error: OSError, arguments: argparse.Namespace) -> str:
    """One line for what the system refused."""
    output = arguments.output or "the output"
    if error.errno in _FULL:
        full = "the disk is full" if error.errno == errno.ENOSPC else "no more may be written"
        where = output if error.filename is None else error.filename
        return f"{where}: {full} ({error.strerror}): make room, {_RESUME}"
    where = f"{arguments.file} or {output}" if error.filename is None else error.filename
    return f"{where}: {error.strerror or error}"


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the block, so that finished work is kept. What is ignored stays
    so: nohup ignores SIGHUP."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _Stopped(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signums = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in signums}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run(arguments: argparse.Namespace, job: Job, source: Source, todo: bulk.Run[Any]) -> bool:
    """Returns whether all was done already."""
    model = locate(arguments.model, revision=arguments.revision, offline=arguments.offline)
    asked = {name: getattr(arguments, name) for name in ("dtype", "quantization", "attention")}
    deciding = ["max_input_tokens"]
    if arguments.openai_batch:
        deciding += ["query_instruction", "default_input_type", "allow_truncated_dimensions"]
    defaults = {name: getattr(arguments, name) for name in deciding}
    with bulk.place(job):
        todo.describe(model, asked, defaults)
        if todo.is_done(resume=arguments.resume):
            return True
        encoder = _encoder(arguments, model)
        encoder.max_tokens = min(encoder.max_tokens, arguments.max_input_tokens or sys.maxsize)
        todo.begin(encoder.runner.info)
        tokenize: Tokenize[Any] = texts(job, source, encoder)
        if arguments.openai_batch:
            tokenize = BatchAnswers(
                encoder,
                InputTokenizer(encoder.tokenizer, encoder.max_tokens, arguments.truncate),
                ServedNames(model.model_id),
                _defaults(arguments),
                arguments.allow_truncated_dimensions,
            ).tokenize
        todo.finish(encoder, tokenize, every=bulk.KEEP_EVERY_S)
    return False


@contextmanager
def _opened(name: str) -> Iterator[Source]:
    """The input. Raises SettingsError or FileError where it is not there, or is no file."""
    with ExitStack() as stack:
        try:
            source = stack.enter_context(text_files.opened(name))
        except FileNotFoundError:
            hint = ""
            if any(sign in name for sign in "*?["):
                hint = " (patterns are not expanded: cat the files | nv-embed encode - -o OUT)"
            raise SettingsError(f"there is no file {name}{hint}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            why = error.strerror if isinstance(error, OSError) else None
            raise SettingsError(f"{name} cannot be read: {why or error}") from None
        yield source


def _rows(arguments: argparse.Namespace, source: Source) -> Rows[Any]:
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


def _mode_of(source: Source) -> int:
    """The permissions of what is written: no more than the input's, whose texts vectors tell."""
    umask = os.umask(0o077)
    os.umask(umask)
    given = 0o666 if source.mode is None else source.mode & 0o666
    return (given & ~umask) | 0o600


def _job(arguments: argparse.Namespace) -> Job:
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
        for name in ("field", "prompt", "instruction", "task", "input_type"):
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
    prefix = _prefix(arguments) or ""
    for name, text in (("prefix", prefix), ("field", arguments.field or "")):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"the {name} is not UTF-8") from None
    return Job(
        target,
        is_folder,
        FORMATS[suffix],
        arguments.field or "text",
        prefix,
        arguments.truncate,
        arguments.shard_size,
    )


def _target(arguments: argparse.Namespace) -> tuple[Path, bool]:
    """The output, and whether it is a folder: it is one, ends in a slash, or has no suffix."""
    given: str | None = arguments.output
    source = Path(arguments.file)
    if given is None:
        if text_files.is_stream(arguments.file) or source.is_relative_to("/dev"):
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


def _check(arguments: argparse.Namespace, job: Job, source: Source) -> None:
    """What only the open input tells. Raises SettingsError."""
    if source.kind is Kind.TEXT and arguments.field is not None:
        raise SettingsError(f"--field is for JSON lines and Parquet, and {source.name} is text")
    if arguments.openai_batch and source.kind is not Kind.JSON_LINES:
        raise SettingsError(f"--openai-batch reads JSON lines, and {source.name} is {source.kind}")
    ours = os.fstat(source.file.fileno())
    for path in (job.target, job.manifest):
        if path.exists() and os.path.samestat(path.stat(), ours):
            raise SettingsError(f"--output {path} is the input file")


def _encoder(arguments: argparse.Namespace, model: ModelSource) -> Encoder:
    with resources.for_good():
        from model.encoder import Encoder

    if arguments.runner:
        return _encoder_around(arguments, model.path)
    return Encoder(
        model,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        threads=arguments.threads,
        cpu_products=arguments.cpu_products,
        max_batch_tokens=arguments.max_batch_tokens,
    )


def _encoder_around(arguments: argparse.Namespace, path: Path) -> Encoder:
    """With another runner than the model, for tests and benchmarks."""
    from model.encoder import Encoder

    runner = load_factory(arguments.runner)(RunnerOptions(path=str(path)))
    limits = BatchLimits(arguments.max_batch_tokens or 1024, max_seqs=256)
    return Encoder.of(NVEmbedTokenizer.from_dir(path), runner, limits, max_tokens=32_768)


def _defaults(arguments: argparse.Namespace) -> Defaults:
    return Defaults.of(arguments.query_instruction, arguments.default_input_type)


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
