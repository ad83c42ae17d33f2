"""A runner within the memory that there turns out to be. Torch-free until a forward fails.

Owns what an error means (a lack of memory, a lost device, neither) and what is tried next when
memory lacks; knows nothing of wires or requests.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.batch import Encoding, num_tokens

if TYPE_CHECKING:
    from model.runner import Runner

logger = logging.getLogger("nv_embed.memory")

_SAID_SO = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "bad_alloc",
    "failed to map segment",
    "alloc_failed",
)
"""What torch's CPU allocator, the CUDA libraries, the dynamic loader and C++ say, all of it as a
RuntimeError, an ImportError or an OSError without a kind of its own."""

_CUDA_MEMORY_ALLOCATION = 2
"""cudaErrorMemoryAllocation: while a module is loaded or a graph made ready, say."""


class FittingRunner:
    """Embeds batches of any size, in parts that fit.

    A batch that does not fit is halved until its parts do; `budget`, the most tokens that are
    tried in one forward after that, is kept. It is not less than what has run before, so that an
    input that takes more memory than its length tells does not leave one-input batches behind;
    unless two batches in a row failed there: then the room has fallen.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.budget: int | None = None
        self._most_done = 0  # tokens of the largest forward that fitted
        self._doubts = 0  # batches in a row with a part that failed though as much has fitted

    def embed(self, encodings: Sequence[Encoding]) -> tuple[NDArray[np.float32], list[int]]:
        """-> (rows [N, D], the inputs that do not fit even alone; their rows are no vectors)."""
        rows = np.zeros((len(encodings), self._runner.info.width), dtype=np.float32)
        too_large: list[int] = []
        todo = [list(range(len(encodings)))]
        fitted, doubtful = 0, False
        while todo:
            part = todo.pop()
            tokens = num_tokens([encodings[index] for index in part])
            if len(part) > 1 and self.budget is not None and tokens > self.budget:
                todo += _halves(part)
                continue
            try:
                got = self._runner.embed([encodings[index] for index in part])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                got = None
            # Not within `except`: there the error holds the failed forward, and with it the memory
            # that is to be handed back.
            if got is None:
                if len(part) > 1 and tokens <= self._most_done:
                    doubtful = True
                self._learn(tokens, len(part))
                if len(part) > 1:
                    todo += _halves(part)
                else:
                    too_large += part
                continue
            assert len(got) == len(part), (got.shape, len(part))
            rows[part] = got
            fitted = max(fitted, tokens)
            self._most_done = max(self._most_done, tokens)
        # An input that does not fit alone explains why the batches around it did not.
        self._doubts = self._doubts + 1 if doubtful and not too_large else 0
        if self._doubts == 2:
            self._doubts, self._most_done, self.budget = 0, fitted, max(fitted, 1)
            logger.warning("there is less room than before: from now on %d tokens", self.budget)
        return rows, sorted(too_large)

    def _learn(self, tokens: int, inputs: int) -> None:
        self.budget = max(min(self.budget or tokens, tokens // 2), self._most_done, 1)
        logger.warning(
            "out of memory with %d tokens of %d inputs: from now on at most %d tokens at once",
            tokens,
            inputs,
            self.budget,
        )
        if torch := sys.modules.get("torch"):  # hand back what the failed forward had cached
            torch.cuda.empty_cache()


def _halves(part: list[int]) -> list[list[int]]:
    """The second half first: a stack takes the last one."""
    middle = len(part) // 2
    return [part[middle:], part[:middle]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's or the host's memory did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's; its name spares the import
    if _is_accelerator_error(error) and _code(error) == _CUDA_MEMORY_ALLOCATION:
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    by_words = isinstance(error, RuntimeError | ImportError | OSError)
    return by_words and any(words in text for words in _SAID_SO)


def loses_device(error: BaseException) -> bool:
    """Whether CUDA itself failed, as by an illegal address or a failed assertion on the device:
    nothing runs in this process any more. Libraries on top of CUDA report their failures as a
    RuntimeError, which does not tell: there the device must be asked."""
    return _is_accelerator_error(error) and not is_out_of_memory(error)


def _is_accelerator_error(error: BaseException) -> bool:
    """torch's; its name spares the import."""
    return any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)


def _code(error: BaseException) -> int | None:
    """The driver's number, which torch sets on the errors that it raises itself."""
    code = getattr(error, "error_code", None)
    return code if isinstance(code, int) else None
