"""The command `nv-embed encode`: from its arguments to a run, its encoder and an exit status.

Owns what becomes of errors and signals. Knows neither how rows are read nor how shards are kept.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from model.errors import UnsupportedError
from model.fitting import is_out_of_memory
from model.hub import locate
from model.prompts import Example
from server.offline import bulk, call, inputs
from server.offline.crew import Alone, SliceCrew, Team
from server.offline.job import Job
from server.offline.parts import OutputError
from server.offline.places import InputFileError
from server.offline.shard_writer import Recipe
from server.offline.sources import ChangedError
from server.offline.stores import shown

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Stopped(BaseException):
    """SIGTERM or SIGHUP: as Ctrl-C, with a status of its own."""

    def __init__(self, signum: int) -> None:
        self.status = 128 + signum


def run(arguments: argparse.Namespace, crew_of: Callable[[Recipe], SliceCrew] | None = None) -> int:
    """Returns the exit status: 0, 1 for a failure, 128 + N when signal N ended the run.

    crew_of: who reads and writes; default: this process, or one for each of its devices.

    Raises SettingsError or ModelError for a wrong call.
    """
    rows_kept = 0
    try:
        job = call.job_of(arguments)
        examples = call.examples_of(arguments)
        with _stoppable(), inputs.opened(arguments.file) as sources:
            job = call.check(arguments, job, sources)
            mode = call.mode_of(sources)
            todo = bulk.Run(job, sources, call.rows_of(arguments, job), mode)
            try:
                done = _run(arguments, job, mode, todo, examples, crew_of)
            finally:
                rows_kept = todo.rows_kept
    except (InputFileError, ChangedError, OutputError) as error:
        return _failed(f"{error}")
    except (KeyboardInterrupt, _Stopped) as stop:
        kept = f"{rows_kept} rows are kept; " if rows_kept else ""
        again = "" if job.is_part else " with --resume"
        _failed(f"interrupted; {kept}the same command{again} goes on")
        return stop.status if isinstance(stop, _Stopped) else 130
    except Exception as error:
        if is_out_of_memory(error):
            return _failed(f"out of memory ({error or 'MemoryError'}); {_RESUME}")
        if isinstance(error, OSError):
            return _failed(_why(error, arguments))
        raise
    _say(job, todo.tally, done)
    return 0


def _say(job: Job, tally: bulk.Tally, done: bool) -> None:
    what = f"{tally.rows} rows in {job.target}"
    if tally.skipped:
        what += f", {tally.skipped} more are skipped ({job.skipped.name})"
    if job.is_part and not tally.is_complete:
        what = f"part {job.part.number} of {job.part.of}"
        what += f" is in {job.target}; others are not yet" if tally.rows else " had nothing to do"
        done = False
    print(f"{what}{' (complete already)' if done else ''}")


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
    where = (
        f"{' '.join(map(shown, arguments.file))} or {output}"
        if error.filename is None
        else error.filename
    )
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
    mode: int,
    todo: bulk.Run[Any],
    examples: Sequence[Example],
    crew_of: Callable[[Recipe], SliceCrew] | None,
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
    config = model.config()
    prompt = call.prompt_of(arguments, config, examples)
    with bulk.place(job):
        todo.describe(model, prompt, asked, {name: getattr(arguments, name) for name in deciding})
        if todo.is_done(resume=arguments.resume):
            return True
        said = argparse.Namespace(
            **{name: value for name, value in vars(arguments).items() if name not in _OF_CLI}
        )
        defaults = call.defaults_of(arguments, config)
        recipe = Recipe(
            said, model, job, mode, prompt, defaults, todo.earlier.settled, bulk.KEEP_EVERY_S
        )
        try:
            _write(recipe, todo, crew_of)
        except bulk.OtherSettledError:
            _write(replace(recipe, settled=todo.earlier.settled), todo, crew_of)
    return False


_OF_CLI = ("parser", "run")
"""What no other process needs of the arguments, nor can be sent."""


def _write(
    recipe: Recipe, todo: bulk.Run[Any], crew_of: Callable[[Recipe], SliceCrew] | None
) -> None:
    devices = recipe.arguments.devices
    try:
        if crew_of is not None:
            with crew_of(recipe) as crew:
                todo.begin(crew.info, recipe.vectors(crew.info))
                todo.finish_slices(crew.write)
            return
        with ExitStack() as stack:
            if len(devices) == 1:
                encoder = recipe.encoder(devices[0])
                info = encoder.runner.info
            else:
                team = stack.enter_context(Team(recipe, devices))
                info = team.info
            todo.begin(info, recipe.vectors(info))
            if len(devices) == 1:
                todo.finish(Alone(recipe.writer(encoder, todo.run)))
            else:
                team.begin(todo.run)
                todo.finish(team)
    except UnsupportedError as error:
        todo.earlier.refuse_settled(error)
