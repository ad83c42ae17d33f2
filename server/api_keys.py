"""API keys as they are given: what one may be, names, files of them. No message holds a key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from model.errors import FileError
from model.user_files import read_text
from server.errors import SettingsError

SHORT_KEY = 16
"""A key with fewer characters is warned of: it could be guessed."""
_LEAST_KEY = 4
"""A key with fewer characters is an accident: what was left of a line, a lone letter."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""What stands in log lines and in labels of metrics."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Whose key it is ("" where nobody says), and the key."""

    name: str
    key: bytes = field(repr=False)


def checked(value: object) -> object:
    """One key, or a list of them. Never split: each part of a key would open the server.

    Raises ValueError.
    """
    return _checked(value, _problem)


def checked_with_names(value: object) -> object:
    """Likewise; each may have its name before it: `name:key`. Raises ValueError."""
    return _checked(value, _problem_of_named)


def _checked(value: object, problem_of: Callable[[str], str | None]) -> object:
    keys = [value] if isinstance(value, str) else value
    for key in keys if isinstance(keys, list) else []:
        if isinstance(key, str) and (problem := problem_of(key)):
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


def _problem_of_named(text: str) -> str | None:
    name, colon, key = text.partition(":")
    if not colon:
        return _problem(text)
    if not _NAME.fullmatch(name):
        return (
            "what stands before the colon is the key's name: a letter or digit, then up to 62 "
            "letters, digits, dots, hyphens and underscores"
        )
    return _problem(key)


def named(text: str) -> ApiKey:
    """`name:key`, or a key without a name."""
    name, colon, key = text.partition(":")
    return ApiKey(name, key.encode()) if colon else ApiKey("", text.encode())


def read_keys(path: Path, flag: str) -> list[str]:
    """One in each line. Raises SettingsError naming the line, and the flag that named the file."""
    return list(_lines(path, _text_of(path, flag), flag, _problem))


def read_named_keys(path: Path, flag: str) -> list[ApiKey]:
    """`key` or `name:key` in each line; or JSON: names, and the key or the keys of each. Raises
    SettingsError as `read_keys` does."""
    text = _text_of(path, flag)
    if text.lstrip().startswith("{"):
        return list(_of_json(path, text, flag))
    return [named(line) for line in _lines(path, text, flag, _problem_of_named)]


def _text_of(path: Path, flag: str) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError, FileError) as error:
        raise SettingsError(f"{flag}: {error}") from None


def _lines(
    path: Path, text: str, flag: str, problem_of: Callable[[str], str | None]
) -> Iterator[str]:
    lines = [line.strip() for line in text.splitlines()]
    found = {number: line for number, line in enumerate(lines, 1) if line and line[0] != "#"}
    if not found:
        raise SettingsError(f"{flag}: {path} holds no key")
    for number, key in found.items():
        if problem := problem_of(key):
            raise SettingsError(f"{flag}: {path}, line {number}: {problem}")
        yield key


def _of_json(path: Path, text: str, flag: str) -> Iterator[ApiKey]:
    try:
        owners = json.loads(text, object_pairs_hook=list)
    except json.JSONDecodeError as error:  # its message holds no text of the file
        raise SettingsError(f"{flag}: {path}: {error}") from None
    except RecursionError:
        raise SettingsError(f"{flag}: {path} is nested too deeply") from None
    names = [name for name, _ in owners]
    if not names:
        raise SettingsError(f"{flag}: {path} holds no key")
    for number, (name, keys) in enumerate(owners, 1):
        where = f"{flag}: {path}, entry {number}"
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise SettingsError(f"{where}: a name is no name, or stands there twice")
        for key in keys if isinstance(keys, list) and keys else [keys]:
            if not isinstance(key, str):
                raise SettingsError(f"{where}: must be a key or a list of keys")
            if problem := _problem(key):
                raise SettingsError(f"{where}: {problem}")
            yield ApiKey(name, key.encode())
