"""What a call names as its input: files, patterns, folders, standard input and URLs, in order.

Owns how names become sources. Knows nothing of rows or outputs.
"""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from server.errors import SettingsError
from server.offline import sources
from server.offline.sources import Source
from server.offline.stores import Stored, real_error, shown, store_of

logger = logging.getLogger("nv_embed.encode")

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://.+|([a-z][a-z0-9+.-]+)://", re.DOTALL)
_IN_FOLDERS = (".txt", ".text", ".jsonl", ".ndjson", ".jsonlines", ".jl", ".parquet", ".pq")
"""What a folder's files are taken for by their suffix; a README.md within is no input."""
_OPENED_AT_ONCE = 16
"""Up to so many files are looked at before anything begins, and stay open."""
_LOCAL = ("file", "local")
"""What fsspec calls this machine's own files."""


def is_url(name: str) -> bool:
    return _URL.fullmatch(name) is not None


def has_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


@contextmanager
def opened(names: Sequence[str]) -> Iterator[list[Source]]:
    """All that `names` stand for. Raises SettingsError or FileError for what is not there, or is
    no file."""
    _refuse_twice(names)
    found = [maker for name in names for maker in _makers(name, alone=len(names) == 1)]
    with ExitStack() as stack:
        inputs = []
        for name, maker in found:
            source = _made(name, partial(maker, looked_at=len(found) <= _OPENED_AT_ONCE))
            stack.callback(source.end)
            if len(found) > _OPENED_AT_ONCE:
                source.close()  # it is opened again when it is its turn
            inputs.append(source)
        yield inputs


def _refuse_twice(names: Sequence[str]) -> None:
    """A pipe has one reader, who takes all."""
    seen: dict[int, str] = {}
    for name in names:
        if sources.is_stream(name):
            number = sources.stream_number(name)
            if number in seen:
                raise SettingsError(f"{seen[number]} and {name}: a pipe is read once")
            seen[number] = name


def folders_of(names: Sequence[str]) -> list[Path]:
    """Those of `names` that are folders of this machine."""
    paths = [path for name in names if (path := _local_path(name)) is not None]
    return [Path(path) for path in paths if os.path.isdir(path)]


def pattern_of(path: Path, names: Sequence[str]) -> str | None:
    """The first of `names` that is a pattern which a file of this name, once there, matches."""
    for name in names:
        pattern = _local_path(name) or ""
        is_pattern = has_pattern(pattern) and not os.path.exists(pattern)
        if is_pattern and _matches(_place_of(path).parts, _place_of(Path(pattern)).parts):
            return name
    return None


def _place_of(path: Path) -> Path:
    """Whole, through links, but for the last name: a link of that name is replaced."""
    return path.parent.resolve() / path.name


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """As glob matches: ** is any folders, and nothing but a dot is for what begins with one."""
    if not (parts and pattern):
        return not parts and all(one == "**" for one in pattern)
    first, one = pattern[0], parts[0]
    fits = not one.startswith(".") or first.startswith(".")
    if first == "**":
        return _matches(parts, pattern[1:]) or (fits and _matches(parts[1:], pattern))
    return fits and fnmatch.fnmatchcase(one, first) and _matches(parts[1:], pattern[1:])


def _local_path(name: str) -> str | None:
    """What a name stands for on this machine; None of other machines' URLs."""
    if not is_url(name):
        return name
    scheme = name.partition("://")[0]
    return f"{store_of(name, scheme)[1]}" if scheme in _LOCAL else None


def _made(name: str, maker: Callable[[], Source]) -> Source:
    try:
        return maker()
    except FileNotFoundError:
        raise SettingsError(f"there is no file {name}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else None
        raise SettingsError(f"{name} cannot be read: {why or error}") from None


def _makers(name: str, *, alone: bool) -> list[tuple[str, Callable[..., Source]]]:
    """The files that one word stands for, sorted, with what opens each."""
    if sources.is_stream(name):
        return [(name, lambda looked_at: sources.stream(name))]
    if is_url(name):
        return _remote(name, alone=alone)
    try:
        if os.path.isdir(name):
            paths = _within(name)
        elif has_pattern(name) and not os.path.exists(name):
            paths = sorted(path for path in glob.glob(name, recursive=True) if _is_file(path))
            if not paths:
                raise SettingsError(f"there is no file {name}: nothing matches the pattern")
        else:
            paths = [name]
    except ValueError as error:
        raise SettingsError(f"{name} cannot be read: {error}") from None
    return [(path, partial(_local, path)) for path in paths]


def _local(name: str, *, looked_at: bool) -> Source:
    return sources.local(name, looked_at=looked_at or not Path(name).suffix)


def _is_file(path: str) -> bool:
    return not os.path.isdir(path)


def _within(folder: str) -> list[str]:
    """The files of known kinds in a folder and those below it, sorted. Hidden ones are none."""
    found: list[str] = []
    others: list[str] = []
    for at, below, names in os.walk(folder):
        below[:] = sorted(one for one in below if not one.startswith("."))
        for name in names:
            if not name.startswith("."):
                known = name.lower().endswith(_IN_FOLDERS)
                (found if known else others).append(os.path.join(at, name))
    _say_left_out(folder, others)
    if not found:
        raise SettingsError(f"{folder} holds no text: {', '.join(_IN_FOLDERS)} are read")
    return sorted(found)


def _say_left_out(folder: str, others: list[str]) -> None:
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        some = ", ".join(sorted(others)[:3])
        logger.warning("%s: files of other kinds are left out: %s%s", folder, some, more)


# URLs


def _remote(url: str, *, alone: bool) -> list[tuple[str, Callable[..., Source]]]:
    scheme = url.partition("://")[0]
    files, path = store_of(url, scheme)
    if scheme in _LOCAL:
        return _makers(path, alone=alone)
    is_web = scheme in ("http", "https")  # where a ? begins the query
    has_signs = has_pattern(url.partition("?")[0] if is_web else url)
    try:
        if has_signs:
            paths = sorted(files.glob(path))
        elif not (is_web and shown(url).lower().endswith(_IN_FOLDERS)) and files.isdir(path):
            paths = _within_store(url, files, path)
        else:
            paths = [path]
        found = {path: files.info(path) for path in paths}
    except SettingsError:
        raise
    except Exception as error:  # of the store's own kinds
        why = real_error(url, error)
        if isinstance(why, FileNotFoundError):
            raise SettingsError(f"there is no file {shown(url)}") from None
        said = shown(f"{why}") or type(why).__name__
        raise SettingsError(f"{shown(url)} cannot be read: {said}") from None
    if has_signs:
        found = {path: info for path, info in found.items() if info.get("type") != "directory"}
    if not found:
        raise SettingsError(f"there is no file {shown(url)}: nothing matches the pattern")
    made: list[tuple[str, Callable[..., Source]]] = []
    for path, info in found.items():
        name = shown(files.unstrip_protocol(path))
        if not isinstance(info.get("size"), int):
            raise SettingsError(
                f"{name}: the store does not say its size, by which inputs are cut: fetch it "
                "first, or send it through a pipe (nv-embed encode - -o OUT)"
            )
        made.append((name, partial(_fetched, Stored(name, files, path, info))))
    return made


def _within_store(url: str, files: Any, folder: str) -> list[str]:
    """As _within."""
    every = []
    for one in sorted(files.find(folder)):
        below = one.removeprefix(folder.rstrip("/"))
        if not any(part.startswith(".") for part in below.split("/")):
            every.append(one)
    found = [one for one in every if one.lower().endswith(_IN_FOLDERS)]
    _say_left_out(shown(url), [shown(one) for one in every if one not in set(found)])
    if not found:
        raise SettingsError(f"{shown(url)} holds no text: {', '.join(_IN_FOLDERS)} are read")
    return found


def _fetched(stored: Stored, *, looked_at: bool) -> Source:
    return sources.remote(stored.name, stored.size, stored.open, stored.check)
