"""Which model ids clients may use, and what their suffix says: `-query` or `-passage`.

Most clients cannot add fields to a request, but all can name a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from model.families import Side
from server.errors import ModelNotFoundError

_SIDES: tuple[Side, ...] = ("query", "passage")


class ServedNames:
    """The ids of the one model that is served. Compared without regard to case."""

    def __init__(self, model_id: str, served: Sequence[str] = ()) -> None:
        self.names = list(served) or [default_name(model_id)]
        accepted = [*self.names, model_id]
        self._sides: dict[str, Side | None] = {}
        for name in accepted:
            for side in _SIDES:
                self._sides.setdefault(f"{name}-{side}".lower(), side)
        # A plain name wins over another's suffix.
        self._sides.update(dict.fromkeys((name.lower() for name in accepted), None))

    def listed(self) -> list[str]:
        """What `/v1/models` shows: the names and their aliases."""
        return [alias for n in self.names for alias in (n, *(f"{n}-{side}" for side in _SIDES))]

    def shown(self, model: str | None) -> str:
        """The id in an answer: as it was asked for, or the first name."""
        return self.names[0] if model is None else model

    def side(self, model: str) -> Side | None:
        """What the suffix of `model` says. Raises ModelNotFoundError for an unknown id."""
        try:
            return self._sides[model.lower()]
        except KeyError:
            shown = repr(model if len(model) <= 128 else model[:128] + "…")
            raise ModelNotFoundError(
                f"The model {shown} does not exist; this server has {', '.join(self.listed())}",
                param="model",
            ) from None


def default_name(model_id: str) -> str:
    """The last part of an id or a path in lower case, with - for what an id has no place for.

    It holds "embed", at its end when not already elsewhere: n8n lists no other models.
    """
    last = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1].lower()
    name = re.sub(r"[^\w.:-]+", "-", last).strip("-.:")
    if not name:
        return "nv-embed"
    return name if "embed" in name else f"{name}-embed"
