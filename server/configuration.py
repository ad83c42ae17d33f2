"""Where values come from: flags, environment, the file of --config, defaults, in this order.

Owns what is refused in them, whatever the option: unknown names, empty and malformed values. Knows
no option by its name.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from model.errors import FileError, did_you_mean
from model.tokenizer import Truncation
from model.user_files import read_text
from server.errors import SettingsError
from server.settings import (
    EMPTY,
    ENV_PREFIX,
    PATH_OPTIONS,
    ChatSettings,
    Settings,
    SettingsT,
)

_SERVICE = re.compile(
    rf"{ENV_PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR))"
)
_PORT = re.compile(rf"{ENV_PREFIX}(\w+_)?PORT(_\d+_(TCP|UDP|SCTP))?")
_ADDRESS = re.compile("(tcp|udp|sctp)://")


def flag_of(name: str) -> str:
    """--max-batch-tokens of max_batch_tokens."""
    return "--" + name.replace("_", "-")


def load(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The server's. Flags over environment over file over defaults. Raises SettingsError."""
    return load_as(Settings, flags, environment)


def load_as(
    kind: type[SettingsT],
    flags: Mapping[str, Any],
    environment: Mapping[str, str],
    named: Callable[[str], str] = flag_of,
) -> SettingsT:
    """As `load`, the fields of `kind` alone; names, but not values, are checked of the others.

    named: how errors call what is given in `flags`.
    """
    known = ChatSettings.model_fields | Settings.model_fields | kind.model_fields
    not_ours = service_links(environment)
    from_environment = {
        name.removeprefix(ENV_PREFIX).lower(): (name, value)
        for name, value in environment.items()
        if name.startswith(ENV_PREFIX) and name not in not_ours
    }
    for option, (name, value) in from_environment.items():
        if option not in known and option != "config":
            names = [ENV_PREFIX + field.upper() for field in known]
            raise SettingsError(f"unknown environment variable {name}{did_you_mean(name, names)}")
        _check_given(option, name, value)
    given: dict[str, tuple[str, Any]] = {**from_environment}
    for option, value in flags.items():
        _check_given(option, named(option), value)
        given[option] = (named(option), value)
    _, path = given.pop("config", ("", None))
    for option, value in read_file(Path(path)).items() if path else ():
        if option not in known:
            raise SettingsError(f"{path}: unknown option {option!r}{did_you_mean(option, known)}")
        origin = f"{path} ({option})"
        _check_given(option, origin, value)
        given.setdefault(option, (origin, value))
    values = {}
    for option, (origin, value) in given.items():
        if option in kind.model_fields:
            values[option] = value
            if isinstance(value, bool) and is_number(known[option]):  # pydantic's 1 or 0
                raise SettingsError(f"{origin}: must be a number, not {str(value).lower()}")
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if not problem["loc"]:
            raise SettingsError(problem["msg"].removeprefix("Value error, ")) from None
        option = str(problem["loc"][0])
        raise SettingsError(f"{given[option][0]}: {_words(problem, known[option])}") from None


def service_links(environment: Mapping[str, str]) -> list[str]:
    """The variables that Kubernetes puts into every pod beside a Service whose name begins with
    nv-embed, unless the pod says `enableServiceLinks: false`. They are no options."""
    return [
        name
        for name, value in environment.items()
        if _SERVICE.fullmatch(name) or (_PORT.fullmatch(name) and _ADDRESS.match(value))
    ]


def _check_given(option: str, origin: str, value: object) -> None:
    """Raises SettingsError when nothing was given in place of a value, or what no answer of a
    server could say: bytes that are not UTF-8, which Python keeps as halves of surrogate pairs.
    The name of a file may hold them."""
    for item in value if isinstance(value, list) and value else [value]:
        if item is None or item in ([], {}) or (isinstance(item, str) and not item.strip()):
            raise SettingsError(f"{origin}: {EMPTY}")
        if isinstance(item, str) and "\0" in item:
            raise SettingsError(f"{origin}: a value holds NUL")
        if isinstance(item, str) and option not in PATH_OPTIONS and not _is_utf8(item):
            raise SettingsError(f"{origin}: a value is not UTF-8")


def _words(problem: ErrorDetails, field: FieldInfo) -> str:
    """What is wrong with a value."""
    context = problem.get("ctx", {})
    known = {
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "greater_than": f"must be above {context.get('gt')}",
        **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "must be a whole number"),
        "int_parsing_size": "has too many digits",
        **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "must be a number"),
        **dict.fromkeys(("bool_parsing", "bool_type"), "must be true or false"),
        "string_type": "must be a text",
        "path_type": "must be a path",
        "list_type": "must be one value or a list",
    }
    text, value = known.get(problem["type"]), problem["input"]
    if choices := choices_of(field):
        text = f"must be {', '.join(choices[:-1])} or {choices[-1]}"
    if text is None or "SecretStr" in repr(field.annotation):
        return text or problem["msg"].removeprefix("Value error, ")
    shown = repr(value) if len(repr(value)) <= 64 else f"{repr(value)[:64]}…"
    return f"{text}, not {shown}" + did_you_mean(str(value), choices)


class _Loader(yaml.SafeLoader):
    """Refuses an option that stands twice, as TOML does: which one was meant?"""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_file(path: Path) -> dict[str, Any]:
    """The options that a file holds. Raises SettingsError."""
    try:
        text = read_text(path)
        is_toml = path.suffix.lower() == ".toml"
        raw = tomllib.loads(text) if is_toml else yaml.load(text, _Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:  # its text quotes the line, which may hold a key
        where = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        problem = re.sub(r"'[^']{2,}'", "a word", str(error.problem))
        raise SettingsError(f"--config: {path}, {where}: {problem}") from None
    except RecursionError:
        raise SettingsError(f"--config: {path} is nested too deeply") from None
    except (OSError, ValueError, FileError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise SettingsError(f"--config: {path} cannot be read: {said}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"--config: {path} must hold options, one `name: value` each")
    options = [str(name).replace("-", "_") for name in raw]
    for option in options:
        if options.count(option) > 1:
            raise SettingsError(f"--config: {path}: {option} stands there twice")
    return dict(zip(options, raw.values(), strict=True))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def choices_of(field: FieldInfo) -> list[str]:
    """The values of an option that has only a few."""
    if field.annotation is Truncation:
        return [value.value for value in Truncation]
    return [str(value) for value in get_args(field.annotation) if isinstance(value, str)]


def is_list(field: FieldInfo) -> bool:
    return isinstance(field.default, list)


def is_number(field: FieldInfo) -> bool:
    return bool({int, float} & {field.annotation, *get_args(field.annotation)})
