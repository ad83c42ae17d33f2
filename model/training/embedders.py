"""What `nv-embed evaluate` and `mine` ask of whoever embeds: texts, their side, and their task.

Whoever embeds writes its own family's template around them: here a model in this process, a
server in `remote`. Owns what becomes of a task's description where a family takes only a side.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from model.families import Side
from model.tokenizer import Truncation

if TYPE_CHECKING:
    from model.encoder import Encoder

logger = logging.getLogger("nv_embed.embedders")


class Embedder(Protocol):
    """texts, their side, and what describes their task ("": nothing does) -> float32 [N, D], of
    length 1."""

    def __call__(self, texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]: ...


class LocalEmbedder:
    """An Embedder around a model in this process."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_tokens: int | None = None,
        truncate: Truncation = Truncation.NONE,
    ) -> None:
        """max_tokens, truncate: as in `Encoder.encode`."""
        self._encoder, self._family = encoder, encoder.tokenizer.family
        self._max_tokens, self._truncate = max_tokens, truncate
        self._taken = TakenTasks(self._family.name, self._family.template)

    def __call__(self, texts: Sequence[str], side: Side, task: str = "", /) -> NDArray[np.float32]:
        """Raises as `Encoder.encode`."""
        prompt = self._family.prompt(side, self._taken(task))
        return self._encoder.encode(
            texts, prompt, max_tokens=self._max_tokens, truncate=self._truncate
        )


class TakenTasks:
    """A task's description as a family takes it: "" where that has no place for one, which is
    said once."""

    def __init__(self, family: str, template: str | None) -> None:
        """template: the family's, None where it takes no description."""
        self._family, self._takes = family, template is not None
        self._has_said = False

    def __call__(self, task: str) -> str:
        if not task or self._takes:
            return task
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "a %s model takes no instruction, only a side: tasks are not described to it",
                self._family,
            )
        return ""
