"""The same text in another case. A teacher that lower-cases, as all-MiniLM-L6-v2 does, has one
vector for all of them; Mistral's tokenizer has other pieces for each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SHOUTED_WORDS = 12
"""Only so short texts are drawn all in capitals, as queries are: of a letter they take a piece."""


def lower(text: str) -> str:
    return text.lower()


def upper(text: str) -> str:
    return text.upper()


def title(text: str) -> str:
    """Each word's first letter a capital, the others as they are not: small."""
    return " ".join(word[:1].upper() + word[1:].lower() for word in text.split(" "))


CASES: dict[str, Callable[[str], str]] = {"lower": lower, "upper": upper, "title": title}


def recased(text: str, rng: np.random.Generator, share: float) -> str:
    """With probability `share` in another case: two in five of these small, one with its words'
    first letters as capitals, two all in capitals if it is short (else small, too)."""
    if rng.random() >= share:
        return text
    draw = rng.random()
    if draw < 0.2:
        return changed(text, title)
    shout = draw < 0.6 and len(text.split()) <= SHOUTED_WORDS
    return changed(text, upper if shout else lower)


def changed(text: str, case: Callable[[str], str]) -> str:
    """In the case, or as it is where it would become another text ("ß" has no capital)."""
    found = case(text)
    return found if found.lower() == text.lower() else text
