"""What ends a command: one line on stderr and an exit status, never a traceback.

Knows no command. At log level debug the traceback of what nobody foresaw is logged.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable

from model.errors import ModelError

logger = logging.getLogger("nv_embed.console")


def run(
    name: str, command: Callable[[], int | None], wrong: tuple[type[Exception], ...] = ()
) -> int:
    """Run `command`; returns its status or 0, 1 for a failure, 2 for a wrong call: a ModelError or
    one of `wrong`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A path or a text that the terminal's encoding lacks is shown, not raised.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            status = command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk or a closed pipe can be told
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough
        _forget_stdout()
        return 1
    except OSError as error:
        _forget_stdout()
        place = f"{error.filename}: " if error.filename is not None else ""
        return _fail(name, f"{place}{error.strerror or error}", 1)
    except MemoryError:
        return _fail(name, "out of memory", 1)
    except Exception as error:
        if isinstance(error, (ModelError, *wrong)):
            return _fail(name, str(error), 2)
        logger.debug("an unforeseen error", exc_info=True)
        said = f"an unforeseen {type(error).__name__}: {error}"
        return _fail(name, f"{said} (log level debug shows where)", 1)
    return status or 0


def _fail(name: str, message: str, status: int) -> int:
    for handler in logging.getLogger().handlers:
        handler.flush()  # what was logged before comes before; a thread may write it
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # full, or closed: the status tells
            sys.stderr.write(
                f"{name}: {' '.join(message.split())}\n"
            )  # whole: no line gets into it
    return status


def _forget_stdout() -> None:
    """What could not be written would be tried again, and complained of, at the very end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
