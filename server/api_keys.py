"""API keys as they are given: what one may be, and files of them. No message holds a key."""

from __future__ import annotations

import re
from pathlib import Path

from model.errors import FileError
from model.user_files import read_text
from server.errors import SettingsError

SHORT_KEY = 16
"""A key with fewer characters is warned of: it could be guessed."""
_LEAST_KEY = 4
"""A key with fewer characters is an accident: what was left of a line, a lone letter."""


def checked(value: object) -> object:
    """One key, or a list of them. Never split: each part of a key would open the server.

    Raises ValueError.
    """
    keys = [value] if isinstance(value, str) else value
    for key in keys if isinstance(keys, list) else []:
        if isinstance(key, str) and (problem := _problem(key)):
            raise ValueError(problem)
    return keys


def _problem(key: str) -> str | None:
    """What is wrong with a key, in words that do not hold it."""
    if not re.fullmatch("[!-~]+", key):
        return "a key has a space or a character that is not ASCII: clients could not send it"
    if "," in key:
        return "a key has a comma: give each key its own --api-key, or its own line in a file"
    if len(key) < _LEAST_KEY:
        return f"a key has fewer than {_LEAST_KEY} characters"
    return None


def read_keys(path: Path, flag: str) -> list[str]:
    """Raises SettingsError naming the line, and the flag that named the file."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError, FileError) as error:
        raise SettingsError(f"{flag}: {error}") from None
    found = {number: line for number, line in enumerate(lines, 1) if line and line[0] != "#"}
    for number, key in found.items():
        if problem := _problem(key):
            raise SettingsError(f"{flag}: {path}, line {number}: {problem}")
    if not found:
        raise SettingsError(f"{flag}: {path} holds no key")
    return list(found.values())
