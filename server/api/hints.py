"""What somebody probably meant: the nearest of the known names. Knows nothing of what they are."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

_SHOWN = re.compile(r"[A-Za-z0-9_.-]{1,40}")


@functools.lru_cache(maxsize=512)
def nearest(name: str, known: frozenset[str]) -> str | None:
    """The one that `name` is most like, if any is like it."""
    plain = re.sub(r"[^a-z0-9/]", "", name.lower())
    same = [k for k in sorted(known) if re.sub(r"[^a-z0-9/]", "", k.lower()) == plain]
    found = same or get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.75)
    return found[0] if found else None


def ignored_names(names: Sequence[str], known: frozenset[str]) -> str:
    """A header's value that names what was ignored: `inputtype (input_type?), 2 more`."""
    shown = [name for name in names if _SHOWN.fullmatch(name)][:5]
    parts: Iterable[str] = (
        f"{name} ({close}?)" if (close := nearest(name, known)) else name for name in shown
    )
    more = [f"{len(names) - len(shown)} more"] if len(shown) < len(names) else []
    return ", ".join([*parts, *more])
