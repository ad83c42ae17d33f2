"""The command `nv-embed encode`: from its arguments to a run, its encoder and an exit status.

Owns what becomes of errors and signals. Knows neither how rows are read nor how shards are kept.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from model.batch import BatchLimits, RunnerOptions
from model.errors import UnsupportedError
from model.fingerprint import fingerprint, kind_of_vectors, of_vectors
from model.fitting import is_out_of_memory
from model.hub import ModelSource, locate
from model.platform import resources
from model.prompts import Example
from model.tokenizer import NVEmbedTokenizer
from server.api.encoding_options import Reading
from server.api.names import ServedNames
from server.engine.inputs import InputTokenizer
from server.engine.worker import load_factory
from server.offline import bulk, call
from server.offline.batch_files import BatchAnswers
from server.offline.job import Job, Tokenize
from server.offline.manifest import Settled
from server.offline.parts import OutputError
from server.offline.sources import Source
from server.offline.text_files import InputFileError
from server.offline.texts import texts

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
        job = call.job_of(arguments)
        examples = call.examples_of(arguments)
        with _stoppable(), call.opened(arguments.file) as source:
            call.check(arguments, job, source)
            mode = call.mode_of(source)
            todo = bulk.Run(job, source, call.rows_of(arguments, source), mode)
            try:
                done = _run(arguments, job, source, todo, examples)
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


def _run(
    arguments: argparse.Namespace,
    job: Job,
    source: Source,
    todo: bulk.Run[Any],
    examples: Sequence[Example],
) -> bool:
    """Returns whether all was done already."""
    model = locate(
        arguments.model,
        revision=arguments.revision,
        offline=arguments.offline,
        family=arguments.family,
    )
    asked = {name: getattr(arguments, name) for name in ("dtype", "quantization", "attention")}
    deciding = ["max_input_tokens"]
    if arguments.openai_batch:
        deciding += ["query_instruction", "default_input_type", "detect_instructions"]
        deciding += ["allow_truncated_dimensions", "token_ids"]
    defaults = {name: getattr(arguments, name) for name in deciding}
    config = model.config()
    prompt = call.prompt_of(arguments, config, examples)
    with bulk.place(job):
        todo.describe(model, prompt, asked, defaults)
        if todo.is_done(resume=arguments.resume):
            return True
        try:
            encoder = _encoder(arguments, model, todo.settled)
        except UnsupportedError as error:
            todo.refuse_settled(error)
        if arguments.max_input_tokens:
            encoder.max_tokens = min(config.most_input_tokens, arguments.max_input_tokens)
        checkpoint, info = fingerprint(model.path), encoder.runner.info
        kind = kind_of_vectors(info.dtype, info.quantization)
        todo.begin(info, of_vectors(checkpoint, config.family, info.width, kind))
        tokenize: Tokenize[Any] = texts(job, source, encoder, prompt)
        if arguments.openai_batch:
            tokenize = BatchAnswers(
                encoder,
                InputTokenizer(encoder.tokenizer, encoder.max_tokens, arguments.truncate),
                ServedNames(model.model_id),
                call.defaults_of(arguments, config),
                arguments.allow_truncated_dimensions,
                config.matryoshka_dimensions,
                checkpoint,
                Reading.of(arguments, config.family),
            ).tokenize
        todo.finish(encoder, tokenize, every=bulk.KEEP_EVERY_S)
    return False


def _encoder(arguments: argparse.Namespace, model: ModelSource, settled: Settled) -> Encoder:
    """settled: what an earlier run found for `auto`."""
    with resources.for_good():
        from model.encoder import Encoder

    if arguments.runner:
        return _encoder_around(arguments, model)
    return Encoder(
        model,
        device=arguments.device,
        dtype=(settled.dtype if arguments.dtype == "auto" else None) or arguments.dtype,
        quantization=arguments.quantization,
        attention=arguments.attention,
        threads=arguments.threads,
        cpu_products=arguments.cpu_products,
        products=settled.products,
        fused_kernels=arguments.fused_kernels,
        max_batch_tokens=arguments.max_batch_tokens,
    )


def _encoder_around(arguments: argparse.Namespace, model: ModelSource) -> Encoder:
    """With another runner than the model, for tests and benchmarks."""
    from model.encoder import Encoder

    options = RunnerOptions(path=str(model.path), family=model.family)
    most_tokens = arguments.max_batch_tokens or options.max_batch_tokens
    return Encoder.of(
        NVEmbedTokenizer.from_dir(model.path, model.family),
        load_factory(arguments.runner)(options),
        BatchLimits(most_tokens, options.max_batch_seqs),
        max_tokens=options.max_input_tokens,
    )
