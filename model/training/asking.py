"""Requests to a chat model, several at a time, until nothing is missing.

Whatever comes is kept, also while an error or Ctrl-C ends it: answers on their way are waited for,
but not for ever. Knows not what is asked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

from model.progress import Progress
from model.training.answers import Answers
from model.training.chat import ChatModel
from model.training.synthesis import Request, SynthesisSettings, pending

_LAST_ANSWERS_S = 30.0
"""What those on their way get at the end; a model may take minutes."""


def ask_all(settings: SynthesisSettings, chat: ChatModel, store: Answers, at_once: int) -> None:
    """Raises what `chat` and `store` raise."""
    while requests := pending(settings, store.known):
        with Progress(len(requests), "Asking", "answers") as bar:
            _ask(requests, chat, store, at_once, bar.advance)


def _ask(
    requests: Sequence[Request],
    chat: ChatModel,
    store: Answers,
    at_once: int,
    answered: Callable[[], object],
) -> None:
    left: SimpleQueue[Request] = SimpleQueue()
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    for request in requests:
        left.put(request)

    def work() -> None:
        with suppress(Empty):
            while True:
                request = left.get_nowait()
                try:
                    store.add(request.id, chat(request.prompt))
                except BaseException as error:  # it is raised by whoever waits
                    ended.put(error)
                else:
                    ended.put(None)

    # Not a pool's threads, which the interpreter waits for when it ends.
    threads = [Thread(target=work, daemon=True) for _ in range(min(at_once, len(requests)))]
    for thread in threads:
        thread.start()
    try:
        for _ in requests:
            if error := ended.get():
                raise error
            answered()
    except BaseException as error:
        chat.stop()
        _wait_for(threads, "" if isinstance(error, KeyboardInterrupt) else f"{error}; ")
        raise


def _wait_for(threads: Sequence[Thread], why: str) -> None:
    """Those that only have to see that it is over end at once."""
    if flying := _alive_after(threads, 0.2):
        _say(
            f"{why}stopping: {flying} answers are on their way and get {_LAST_ANSWERS_S:g} s "
            "(Ctrl-C: none)"
        )
        if lost := _alive_after(threads, _LAST_ANSWERS_S):
            _say(f"{lost} answers were not waited for: they will be asked for again")


def _alive_after(threads: Sequence[Thread], seconds: float) -> int:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return sum(thread.is_alive() for thread in threads)


def _say(message: str) -> None:
    print(f"\n{message}", file=sys.stderr, flush=True)
