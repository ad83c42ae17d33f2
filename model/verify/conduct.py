"""Runs steps in child processes, one after another, whatever becomes of them.

A fault on a GPU leaves the process that met it useless, a crash takes it, and a driver may hang:
so, as the server does, each model has a process of its own, and a step that fails costs the others
nothing. Knows nothing of what the steps measure. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

_START_S = 120.0
"""What a process may take to import torch and to find its device, beside its first step's limit."""
_STOP_S = 10.0
_MOST_SAID = 4000
"""Characters of what a crashed process wrote."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. Neighbours of one `process` share it, and the model that it loaded."""

    name: str  # "section.part": where its result goes in the report
    process: str
    measure: str  # "module:function", of a Bench and `options`; gives a dict
    limit_s: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step: done, failed (a check did), skipped (why, in `error`) or error."""

    step: Step
    status: str
    seconds: float
    result: dict[str, Any] | None = None
    error: str | None = None


def conduct(
    steps: Sequence[Step],
    job: Mapping[str, Any],
    log: Path,
    begin: Callable[[Step], None] = lambda step: None,
) -> Iterator[Outcome]:
    """Run `steps` in their order; yields the outcome of each.

    job: what each process is told, see `model.verify.bench`. log: where they write what they say.
    """
    for _, group in groupby(steps, key=lambda step: step.process):
        left = list(group)
        while left:
            yield from _in_one_process(left, job, log, begin)


def _in_one_process(
    left: list[Step], job: Mapping[str, Any], log: Path, begin: Callable[[Step], None]
) -> Iterator[Outcome]:
    """Take steps from `left` until none is left or the process is of no more use."""
    patience = _START_S
    with _Child(left, job, log) as child:
        while left:
            step = left.pop(0)
            begin(step)
            started, limit = time.monotonic(), patience + step.limit_s
            patience = 0.0
            try:
                answer = child.answer(limit)
            except TimeoutError:
                error = f"no end after {limit:g} s: {child.aborted()}"
                yield Outcome(step, "error", time.monotonic() - started, error=error)
                return
            if answer is None:
                yield Outcome(step, "error", time.monotonic() - started, error=child.last_words())
                return
            useless = answer.pop("useless", False)
            yield Outcome(step, **answer)
            if useless:
                return


class _Child:
    """A process that answers one line of JSON a step."""

    def __init__(self, steps: Sequence[Step], job: Mapping[str, Any], log: Path) -> None:
        self._answers, theirs = os.pipe()
        self._unread, self._log = b"", log
        try:
            with log.open("ab") as said:
                self._said_before = said.tell()
                self._process = subprocess.Popen(  # noqa: S603
                    # -P: a model.py in the working directory is not what we mean.
                    [sys.executable, "-P", "-m", "model.verify.child", str(theirs)],
                    pass_fds=[theirs],
                    stdin=subprocess.PIPE,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,  # what it starts ends with it
                )
        finally:
            os.close(theirs)
        message = json.dumps({**job, "steps": [asdict(step) for step in steps]})
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(message.encode())

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        """Whatever is left of it is killed: it has nothing more to say."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for ever
            self._process.wait(_STOP_S)
        os.close(self._answers)

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None when the process has ended. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], deadline - time.monotonic())
            if not ready:
                raise TimeoutError
            data = os.read(self._answers, 1 << 16)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def aborted(self) -> str:
        """End it. What it was at is in its last words: faulthandler writes that down."""
        self._process.send_signal(signal.SIGABRT)
        return self.last_words()

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        status = self._process.returncode
        how = "does not end" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        with self._log.open("rb") as file:
            file.seek(self._said_before)
            said = file.read().decode(errors="replace")[-_MOST_SAID:]
        return f"the process {how}\n{said}".rstrip()
