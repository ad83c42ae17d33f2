"""A process of `nv-embed gpu-check`: does the steps that it is told, and answers each in a line.

python -m model.verify.child FD    the job is JSON on its standard input; answers go to FD
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import math
import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

import numpy as np

from model.errors import UnsupportedError
from model.platform import resources

if TYPE_CHECKING:
    from model.verify.bench import Bench

_PR_SET_PDEATHSIG = 1


def main(fd: int) -> int:
    """Do the steps of the job; returns the exit status."""
    end_with_parent()
    faulthandler.enable()
    job = json.load(sys.stdin)
    started = time.perf_counter()
    with resources.for_good():  # a tenth less
        import torch  # noqa: F401  # timed

    import_s = time.perf_counter() - started
    with os.fdopen(fd, "w", encoding="utf-8") as answers, _within(job.get("within")):
        from model.verify.bench import Bench

        bench = Bench(job, import_s)
        for step in job["steps"]:
            answer = _answer(bench, step)
            answers.write(json.dumps(_plain(answer), allow_nan=False) + "\n")
            answers.flush()
            if answer.get("useless"):
                return 1
    return 0


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signum` when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signum)


def called(name: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _within(name: str | None) -> contextlib.AbstractContextManager[object]:
    """The context that tests run the steps in: an emulated device."""
    context: contextlib.AbstractContextManager[object] = (
        called(name)() if name else contextlib.nullcontext()
    )
    return context


def _answer(bench: Bench, step: dict[str, Any]) -> dict[str, Any]:
    started = time.perf_counter()

    def answer(status: str, **more: Any) -> dict[str, Any]:
        return {"status": status, "seconds": time.perf_counter() - started, **more}

    try:
        result = called(step["measure"])(bench, **step["options"])
    except UnsupportedError as error:
        return answer("skipped", error=str(error))
    except Exception:
        shown = traceback.format_exc()
        return answer("error", error=shown, useless=not bench.device_works())
    failed = any(check["status"] == "failed" for check in result.get("checks", ()))
    return answer("failed" if failed else "done", result=result)


def _plain(value: Any) -> Any:
    """As JSON has it: no tuples, no numpy, no NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
