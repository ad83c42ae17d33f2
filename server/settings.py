"""Every option: its default, its reason, its names.

One class feeds the flags (`--max-batch-tokens`), the environment (`NV_EMBED_MAX_BATCH_TOKENS`)
and the file of `--config` (`max_batch_tokens: …`), in this order of precedence. Commands without a
server take the part that they need, by the same names and from the same places. Unknown names,
empty or malformed values and contradictions stop the start.
"""

from __future__ import annotations

import argparse
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from model.errors import FileError, did_you_mean
from model.tokenizer import Truncation
from model.user_files import open_regular, read_text
from server.errors import SettingsError

ENV_PREFIX = "NV_EMBED_"
MAX_REQUEST_INPUTS = 2048
"""OpenAI's limit on the inputs of one request."""
MAX_REQUEST_TOKENS = 300_000
"""OpenAI's limit on the tokens summed over one request."""
_PATHS = ("model", "uds", "api_key_file", "tls_certificate", "tls_key", "config")
EMPTY = "a value is empty: leave the option out, or give it one"
"""The one rule, for flags, environment and file. An unset variable of a shell or a compose file
would otherwise mean much: every address, no key, another model."""
SHORT_KEY = 16
"""A key with fewer characters is warned of: it could be guessed."""
_LEAST_KEY = 4
"""A key with fewer characters is an accident: what was left of a line, a lone letter."""
_COUNT = 2**31 - 1
"""Frames and tensors hold counts in 32 bits."""
_BYTES = 2**50
_DAY_S = 86_400
_THREADS = 1024
"""With too many, OpenMP ends the process, and no error can be shown."""
DEVICE = r"auto|cpu|cuda(:(\d{1,4}|(GPU|MIG)-[0-9A-Za-z/-]+))?"
"""What --devices takes."""
_UDS_BYTES = 107
"""Of sockaddr_un's path, without its NUL."""


def _split(value: object) -> object:
    """Lists may be written a,b; a flag may also be repeated."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list):
        return [part for item in value for part in _parts(item)]
    return value


def _parts(item: object) -> list[object]:
    if not isinstance(item, str):
        return [item]
    parts: list[object] = [part.strip() for part in item.split(",")]
    if not all(parts):
        raise ValueError(EMPTY)
    return parts


def _keys(value: object) -> object:
    """One key, or a list of them. Never split: each part of a key would open the server."""
    keys = [value] if isinstance(value, str) else value
    for key in keys if isinstance(keys, list) else []:
        if isinstance(key, str) and (problem := _key_problem(key)):
            raise ValueError(problem)
    return keys


def _key_problem(key: str) -> str | None:
    """What is wrong with a key, in words that do not hold it."""
    if not re.fullmatch("[!-~]+", key):
        return "a key has a space or a character that is not ASCII: clients could not send it"
    if "," in key:
        return "a key has a comma: give each key its own --api-key, or its own line in a file"
    if len(key) < _LEAST_KEY:
        return f"a key has fewer than {_LEAST_KEY} characters"
    return None


Words = Annotated[list[str], BeforeValidator(_split)]
Keys = Annotated[list[SecretStr], BeforeValidator(_keys)]


class MachineSettings(BaseModel):
    """Where a command runs, and what it logs."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    devices: Words = Field(
        ["auto"],
        description="where to run, one engine worker each: auto (every visible GPU, else one CPU "
        "worker), cpu, cuda, cuda:N, cuda:UUID of a GPU or a MIG slice (nvidia-smi -L), or "
        "several: cuda:0,cuda:1 or cpu,cpu; --device is the same",
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=_THREADS,
        description="CPU threads of each worker; default: the usable cores shared by CPU workers",
    )
    log_format: Literal["text", "json"] = Field("text", description="log lines as text or JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )

    @model_validator(mode="after")
    def _known_devices(self) -> MachineSettings:
        if "auto" in self.devices and len(self.devices) > 1:
            raise ValueError("--devices auto stands alone: name the devices, or only auto")
        for device in self.devices:
            if not re.fullmatch(DEVICE, device):
                raise ValueError(
                    f"--devices {device}: must be auto, cpu, cuda or cuda:N, a number or a UUID"
                )
        return self

    def one_device(self) -> str:
        """For a command that runs on one. Raises SettingsError when several are named."""
        if len(self.devices) > 1:
            raise SettingsError(
                f"this command runs on one device, and {', '.join(self.devices)} are named: "
                "choose one with --device"
            )
        (device,) = self.devices
        _, _, number = device.partition(":")
        if number and not number.isdigit():
            raise SettingsError(
                f"this command knows GPUs by their numbers: set CUDA_VISIBLE_DEVICES={number} and "
                "name cuda:0"
            )
        return device


class ModelSettings(MachineSettings):
    """Which model, and how it runs."""

    model: str | None = Field(
        None,
        description="checkpoint: a folder in the official layout, or a Hugging Face id such as "
        "nvidia/NV-Embed-v2",
    )
    revision: str | None = Field(
        None, description="commit, tag or branch of a hub id; NVIDIA's ids have a pinned one"
    )
    offline: bool = Field(False, description="use the local cache only, never the network")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="working type; auto: bfloat16 on GPUs and on CPUs that multiply it faster "
        "than float32 (which is tried), else float32",
    )
    quantization: Literal["none", "int8", "int8-dynamic", "float8"] = Field(
        "none",
        description="8-bit weights. int8-dynamic: on the CPU, less memory and time than float32 "
        "(refused where it is no faster). float8: the same on GPUs (Ada, Hopper). int8: LLM.int8 "
        "through bitsandbytes, less memory, not less time; a vector depends a little on its batch",
    )
    cpu_products: Literal["auto", "plain", "allow-slow"] = Field(
        "auto",
        description="matrix products on a CPU. auto: the fastest that prove right on this "
        "processor; plain: torch's own, nothing is tried; allow-slow: as auto, and int8-dynamic "
        "even where it is no faster than float32",
    )
    attention: Literal["auto", "flash-attn", "varlen", "padded", "sdpa"] = Field(
        "auto", description="attention kernel; auto: the best that runs on the device"
    )

    @model_validator(mode="after")
    def _revision_of_a_model(self) -> ModelSettings:
        if self.revision and self.model is None:
            raise ValueError("--revision needs --model")
        return self


class EncodeSettings(ModelSettings):
    """What else decides a text's vector, or how many are made at once."""

    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        le=_COUNT,
        description="tokens in one forward; default 8192 on GPUs, 1024 on the CPU, where more "
        "costs latency and gains no throughput",
    )
    max_input_tokens: int | None = Field(
        None,
        ge=2,
        le=_COUNT,
        description="longest input, BOS, instruction and EOS counted; default: the model's own",
    )
    truncate: Truncation = Field(
        Truncation.NONE,
        description="longer inputs: none (a 400), end (keep the first tokens) or start (keep the "
        "instruction and the last tokens); requests can choose their own",
    )
    query_instruction: str = Field(
        "Given a question, retrieve passages that answer the question",
        description="task description for input_type=query, or the name of a task that "
        "/v1/instructions lists; none: no instruction",
    )
    default_input_type: Literal["none", "query", "passage"] = Field(
        "none", description="what inputs are when nothing else says it"
    )
    allow_truncated_dimensions: bool = Field(
        False,
        description="serve `dimensions` below the model's: cut and renormalise. The model was not "
        "trained for it, so quality is unknown",
    )
    runner: str | None = Field(None, description="hidden: module:factory of another runner")

    @field_validator("query_instruction")
    @classmethod
    def _none_is_none(cls, value: str) -> str:
        return "" if value.lower() == "none" else value


class KeySettings(ModelSettings):
    """The keys that a server asks for, and one of which its client sends."""

    api_key: Keys = Field(
        [],
        description="key that clients must send as a bearer token; for several repeat the flag. "
        "Everybody on the machine sees it in `ps`: prefer --api-key-file",
    )
    api_key_file: Path | None = Field(
        None, description="file with one key in each line; # begins a comment line"
    )

    def api_keys(self) -> list[bytes]:
        """All keys of the flag, the environment and the file. Raises SettingsError."""
        keys = [key.get_secret_value() for key in self.api_key]
        if self.api_key_file is not None:
            keys += _read_keys(self.api_key_file)
        return [key.encode() for key in keys]


class Settings(EncodeSettings, KeySettings):
    """See the fields; `nv-embed serve --help` shows the same texts."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    uds: str | None = Field(None, description="listen on this Unix socket instead of a port")
    root_path: str = Field("", description="path prefix that a proxy in front strips")

    cuda_graphs: bool = Field(
        False,
        description="record the forward of small batches at the start and replay it: shorter "
        "answers to single queries on a GPU, for some memory",
    )

    max_batch_seqs: int = Field(
        256, ge=1, le=_COUNT, description="inputs in one forward; more would gain nothing"
    )
    max_queued_tokens: int = Field(
        1_000_000,
        ge=1,
        le=_COUNT,
        description="tokens that may wait; beyond it requests get 429 and Retry-After",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        le=_BYTES,
        description="memory for vectors of inputs seen before, by their exact ids; 0: none. "
        "Beware: with it a fast answer reveals that somebody asked the same before",
    )

    served_model_name: Words = Field(
        [],
        description="id that clients use; default: the checkpoint's name in lower case, with "
        "-embed behind it when it has no embed in it (n8n lists no other models)",
    )
    cors_origin: Words = Field(
        [], description="origin allowed to call from browsers, or *; default: none"
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024, ge=1024, le=_BYTES, description="largest request body; beyond it a 413"
    )
    max_inflight_bytes: int = Field(
        1024**3,
        ge=1024,
        le=_BYTES,
        description="bytes of bodies and answers in memory at once; beyond it requests get 429",
    )
    docs: bool = Field(True, description="serve /docs, /redoc and /openapi.json")
    metrics_need_key: bool = Field(
        False, description="ask for an API key at /metrics, too, when there are keys"
    )
    tls_certificate: Path | None = Field(None, description="PEM file: serve https with it")
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key")
    max_connections: int = Field(
        4096,
        ge=1,
        le=_COUNT,
        description="open connections, if the limit on open files allows so many; beyond it a 503",
    )
    header_timeout: float = Field(
        10.0, gt=0, le=_DAY_S, description="seconds in which the headers of a request must arrive"
    )
    body_timeout: float = Field(
        120.0, gt=0, le=_DAY_S, description="seconds in which the body of a request must arrive"
    )
    write_timeout: float = Field(
        60.0,
        gt=0,
        le=_DAY_S,
        description="seconds after which a client that does not read is cut off",
    )
    hang_timeout: float = Field(
        60.0,
        gt=0,
        le=_DAY_S,
        description="seconds without an answer after which a worker is killed and its batch given "
        "to another; more when the measured rate says that a batch takes long",
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        le=_DAY_S,
        description="seconds to finish accepted requests after SIGTERM, SIGINT or SIGHUP",
    )
    access_log: bool = Field(True, description="one line per request, without its texts")

    @field_validator("host")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        try:
            value.encode("idna")  # as the socket will: it raises what is no OSError
        except UnicodeError:
            raise ValueError("is neither an address nor a host's name") from None
        return value

    @field_validator("uds")
    @classmethod
    def _fits_a_socket(cls, value: str | None) -> str | None:
        if value is not None and (size := len(os.fsencode(value))) > _UDS_BYTES:
            raise ValueError(f"a socket's path has at most {_UDS_BYTES} bytes, this one {size}")
        return value

    @field_validator("root_path")
    @classmethod
    def _is_a_prefix(cls, value: str) -> str:
        if not re.fullmatch(r"(/[^/?#\s]+)+", value):
            raise ValueError("must begin with / and end without one, as in /api")
        return value

    @field_validator("cors_origin")
    @classmethod
    def _are_origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"{origin!r} is no origin: browsers send https://host or https://host:port, "
                    "without a path; * is any"
                )
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> Settings:
        if self.max_queued_tokens < MAX_REQUEST_TOKENS:
            raise ValueError(
                f"--max-queued-tokens {self.max_queued_tokens} is less than one legal request "
                f"({MAX_REQUEST_TOKENS:,} tokens): raise it"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        return self


HIDDEN = {"runner"}
T = TypeVar("T", bound=MachineSettings)


def add_flags(
    parser: argparse._ActionsContainer, kind: type[MachineSettings] = Settings, *, but: str = ""
) -> None:
    """One flag per field of `kind`, `but` left out. Values stay text: `load` validates them."""
    for name, field in kind.model_fields.items():
        if name == but:
            continue
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif _is_list(field):
            options |= {"action": "append", "metavar": name.upper()}
        else:
            options["metavar"] = f"{{{','.join(_choices(field))}}}" if _choices(field) else None
            options["metavar"] = options["metavar"] or name.upper()
        options["help"] = argparse.SUPPRESS if name in HIDDEN else _help(name, field)
        flags = [_flag(name)]
        if name == "devices" and issubclass(kind, Settings):
            flags.append("--device")
        elif name == "devices":  # the commands without a server run on one
            flags, options["metavar"] = ["--device"], "DEVICE"
            options["help"] = f"auto, cpu, cuda or cuda:N (default: auto) [{ENV_PREFIX}DEVICES]"
        parser.add_argument(*flags, **options)
    parser.add_argument(
        "--config",
        dest="config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="YAML, JSON or TOML file of the server's options (model: NAME, port: N) "
        f"[{ENV_PREFIX}CONFIG]",
    )


def load(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The server's. Flags over environment over file over defaults. Raises SettingsError."""
    return load_as(Settings, flags, environment)


def load_as(kind: type[T], flags: Mapping[str, Any], environment: Mapping[str, str]) -> T:
    """As `load`, the fields of `kind` alone; names, but not values, are checked of the others."""
    known = Settings.model_fields
    from_environment = {
        name.removeprefix(ENV_PREFIX).lower(): (name, value)
        for name, value in environment.items()
        if name.startswith(ENV_PREFIX)
    }
    for option, (name, value) in from_environment.items():
        if option not in known and option != "config":
            names = [ENV_PREFIX + field.upper() for field in known]
            raise SettingsError(f"unknown environment variable {name}{did_you_mean(name, names)}")
        _check_given(option, name, value)
    given: dict[str, tuple[str, Any]] = {**from_environment}
    for option, value in flags.items():
        _check_given(option, _flag(option), value)
        given[option] = (_flag(option), value)
    _, path = given.pop("config", ("", None))
    for option, value in _read_file(Path(path)).items() if path else ():
        if option not in known:
            raise SettingsError(f"{path}: unknown option {option!r}{did_you_mean(option, known)}")
        origin = f"{path} ({option})"
        _check_given(option, origin, value)
        given.setdefault(option, (origin, value))
    values = {}
    for option, (origin, value) in given.items():
        if option in kind.model_fields:
            values[option] = value
            if isinstance(value, bool) and _is_number(known[option]):  # pydantic's 1 or 0
                raise SettingsError(f"{origin}: must be a number, not {str(value).lower()}")
    try:
        return kind(**values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if not problem["loc"]:
            raise SettingsError(problem["msg"].removeprefix("Value error, ")) from None
        option = str(problem["loc"][0])
        raise SettingsError(f"{given[option][0]}: {_words(problem, known[option])}") from None


def _check_given(option: str, origin: str, value: object) -> None:
    """Raises SettingsError when nothing was given in place of a value, or what no answer of a
    server could say: bytes that are not UTF-8, which Python keeps as halves of surrogate pairs.
    The name of a file may hold them."""
    for item in value if isinstance(value, list) and value else [value]:
        if item is None or item in ([], {}) or (isinstance(item, str) and not item.strip()):
            raise SettingsError(f"{origin}: {EMPTY}")
        if isinstance(item, str) and "\0" in item:
            raise SettingsError(f"{origin}: a value holds NUL")
        if isinstance(item, str) and option not in _PATHS and not _is_utf8(item):
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
    if choices := _choices(field):
        text = f"must be {', '.join(choices[:-1])} or {choices[-1]}"
    if text is None or "SecretStr" in repr(field.annotation):
        return text or problem["msg"].removeprefix("Value error, ")
    shown = repr(value) if len(repr(value)) <= 64 else f"{repr(value)[:64]}…"
    return f"{text}, not {shown}" + did_you_mean(str(value), choices)


def exposed(settings: Settings, config: str | None) -> Iterator[str]:
    """Warnings about secrets that are easy to read or to guess; `config`: the file of options.

    Raises SettingsError for a file of keys or certificates that cannot be read.
    """
    files = {"--api-key-file": settings.api_key_file, "--tls-key": settings.tls_key}
    for option, path in {**files, "--tls-certificate": settings.tls_certificate}.items():
        try:
            if path is not None:
                open_regular(path).close()  # OpenSSL would wait for a FIFO
        except (OSError, FileError) as error:
            raise SettingsError(f"{option}: {error}") from None
    if config is not None and "api_key" in _read_file(Path(config)):
        files["--config"] = Path(config)
    for option, path in files.items():
        mode = path.stat().st_mode & 0o777 if path is not None and path.is_file() else 0
        if mode & 0o077:
            yield f"{option}: {path} is open to others (mode {mode:04o}); chmod 600 closes it"
    short = sum(len(key) < SHORT_KEY for key in settings.api_keys())
    if short:
        yield f"{short} API key(s) have fewer than {SHORT_KEY} characters and could be guessed"


def _read_keys(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError, FileError) as error:
        raise SettingsError(f"--api-key-file: {error}") from None
    found = {number: line for number, line in enumerate(lines, 1) if line and line[0] != "#"}
    for number, key in found.items():
        if problem := _key_problem(key):
            raise SettingsError(f"--api-key-file: {path}, line {number}: {problem}")
    if not found:
        raise SettingsError(f"--api-key-file: {path} holds no key")
    return list(found.values())


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


def _read_file(path: Path) -> dict[str, Any]:
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


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _choices(field: FieldInfo) -> list[str]:
    """The values of an option that has only a few."""
    if field.annotation is Truncation:
        return [value.value for value in Truncation]
    return [str(value) for value in get_args(field.annotation) if isinstance(value, str)]


def _is_list(field: FieldInfo) -> bool:
    return isinstance(field.default, list)


def _is_number(field: FieldInfo) -> bool:
    return bool({int, float} & {field.annotation, *get_args(field.annotation)})


def _help(name: str, field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, list):
        default = ",".join(default)
    shown = f" (default: {default})" if default not in (None, "", False) else ""
    return f"{field.description}{shown} [{ENV_PREFIX}{name.upper()}]".replace("%", "%%")
