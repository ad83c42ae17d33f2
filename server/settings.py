"""Every option: its default, its reason, its names.

One class feeds the flags (`--max-batch-tokens`), the environment (`NV_EMBED_MAX_BATCH_TOKENS`)
and the file of `--config` (`max_batch_tokens: …`), in this order of precedence. Unknown names,
malformed values and contradictions stop the start.
"""

from __future__ import annotations

import argparse
import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from model.tokenizer import Truncation
from server.errors import SettingsError

ENV_PREFIX = "NV_EMBED_"
MAX_REQUEST_INPUTS = 2048
"""OpenAI's limit on the inputs of one request."""
MAX_REQUEST_TOKENS = 300_000
"""OpenAI's limit on the tokens summed over one request."""


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
        # An unset variable in a shell or a compose file: no key would mean no authentication.
        raise ValueError("a value is empty")
    return parts


Words = Annotated[list[str], BeforeValidator(_split)]
Secrets = Annotated[list[SecretStr], BeforeValidator(_split)]


class Settings(BaseModel):
    """See the fields; `nv-embed serve --help` shows the same texts."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model: str | None = Field(
        None,
        min_length=1,
        description="checkpoint: a folder in the official layout, or a Hugging Face id such as "
        "nvidia/NV-Embed-v2",
    )
    revision: str | None = Field(
        None, description="commit, tag or branch of a hub id; NVIDIA's ids have a pinned one"
    )
    offline: bool = Field(False, description="use the local cache only, never the network")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    uds: str | None = Field(None, description="listen on this Unix socket instead of a port")
    root_path: str = Field("", description="path prefix that a proxy in front strips")

    devices: Words = Field(
        ["auto"],
        description="where to run, one engine worker each: auto (every visible GPU, else one CPU "
        "worker), cpu, cuda, cuda:N, or several: cuda:0,cuda:1 or cpu,cpu; --device is the same",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="working type; auto: bfloat16 on GPUs and on CPUs with AMX, else float32",
    )
    quantization: Literal["none", "int8", "int8-dynamic", "float8"] = Field(
        "none",
        description="8-bit weights. int8-dynamic: 8-bit products on the CPU, smaller and faster; "
        "float8: the same on GPUs (Ada, Hopper); int8: LLM.int8 through bitsandbytes, saves "
        "memory, not time",
    )
    attention: Literal["auto", "flash-attn", "varlen", "padded", "sdpa"] = Field(
        "auto", description="attention kernel; auto: the best that runs on the device"
    )
    cuda_graphs: bool = Field(
        False,
        description="record the forward of small batches at the start and replay it: shorter "
        "answers to single queries on a GPU, for some memory",
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each worker; default: the usable cores shared by CPU workers",
    )

    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one forward; default 8192 on GPUs, 1024 on the CPU, where more "
        "costs latency and gains no throughput",
    )
    max_batch_seqs: int = Field(
        256, ge=1, description="inputs in one forward; more would gain nothing"
    )
    max_input_tokens: int | None = Field(
        None,
        ge=2,
        description="longest input, BOS, instruction and EOS counted; default: the model's own",
    )
    max_queued_tokens: int = Field(
        1_000_000,
        ge=1,
        description="tokens that may wait; beyond it requests get 429 and Retry-After",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        description="memory for vectors of inputs seen before, by their exact ids; 0: none. How "
        "fast an answer comes then tells a client whether somebody asked for the same",
    )
    truncate: Truncation = Field(
        Truncation.NONE,
        description="longer inputs: none (a 400), end (keep the first tokens) or start (keep the "
        "instruction and the last tokens); requests can choose their own",
    )

    query_instruction: str = Field(
        "Given a question, retrieve passages that answer the question",
        description="task description for input_type=query, or the name of a task that "
        "/v1/instructions lists",
    )
    default_input_type: Literal["none", "query", "passage"] = Field(
        "none", description="what inputs are when a request does not say"
    )
    allow_truncated_dimensions: bool = Field(
        False,
        description="serve `dimensions` below the model's: cut and renormalise. The model was not "
        "trained for it, so quality is unknown",
    )

    api_key: Secrets = Field(
        [], description="key that clients must send as a bearer token; several are allowed"
    )
    api_key_file: Path | None = Field(None, description="file with one key per line")
    served_model_name: Words = Field(
        [], description="id that clients use; default: from the checkpoint's name, in lower case"
    )
    cors_origin: Words = Field(
        [], description="origin allowed to call from browsers, or *; default: none"
    )
    max_body_bytes: int = Field(
        32 * 1024 * 1024, ge=1024, description="largest request body; beyond it a 413"
    )
    max_inflight_bytes: int = Field(
        1024**3,
        ge=1024,
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
        description="open connections, if the limit on open files allows so many; beyond it a 503",
    )
    header_timeout: float = Field(
        10.0, gt=0, description="seconds in which the headers of a request must arrive"
    )
    body_timeout: float = Field(
        120.0, gt=0, description="seconds in which the body of a request must arrive"
    )
    write_timeout: float = Field(
        60.0, gt=0, description="seconds after which a client that does not read is cut off"
    )
    hang_timeout: float = Field(
        60.0,
        gt=0,
        description="seconds without an answer after which a worker is killed and its batch given "
        "to another; more when the measured rate says that a batch takes long",
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        description="seconds to finish accepted requests after SIGTERM, SIGINT or SIGHUP",
    )
    log_format: Literal["text", "json"] = Field("text", description="log lines as text or JSON")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    access_log: bool = Field(True, description="one line per request, without its texts")
    runner: str | None = Field(None, description="hidden: module:factory of another runner")

    @model_validator(mode="after")
    def _no_contradictions(self) -> Settings:
        if self.max_queued_tokens < MAX_REQUEST_TOKENS:
            raise ValueError(
                f"--max-queued-tokens {self.max_queued_tokens} is less than one legal request "
                f"({MAX_REQUEST_TOKENS:,} tokens): raise it"
            )
        if "auto" in self.devices and len(self.devices) > 1:
            raise ValueError("--devices auto stands alone: name the devices, or only auto")
        for device in self.devices:
            if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
                raise ValueError(f"--devices {device}: must be auto, cpu, cuda or cuda:N")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("--tls-certificate and --tls-key go together")
        if self.revision and self.model is None:
            raise ValueError("--revision needs --model")
        return self

    def api_keys(self) -> list[bytes]:
        """All keys of the flag, the environment and the file. Raises SettingsError."""
        keys = [key.get_secret_value() for key in self.api_key]
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, ValueError) as error:
                raise SettingsError(f"--api-key-file: {error}") from error
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise SettingsError(f"--api-key-file: {self.api_key_file} holds no key")
            keys += found
        return [key.encode() for key in keys]


HIDDEN = {"runner"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field. Values stay text: `load` validates them."""
    for name, field in Settings.model_fields.items():
        flags = [_flag(name)] + (["--device"] if name == "devices" else [])
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        if field.annotation is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif _is_list(field):
            options |= {"action": "append", "metavar": name.upper()}
        else:
            options["metavar"] = _choices(field) or name.upper()
        options["help"] = argparse.SUPPRESS if name in HIDDEN else _help(name, field)
        parser.add_argument(*flags, **options)
    parser.add_argument(
        "--config",
        dest="config",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help=f"YAML, JSON or TOML file of these options (model: …, port: …) [{ENV_PREFIX}CONFIG]",
    )


def load(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """Flags over environment over file over defaults. Raises SettingsError."""
    fields = Settings.model_fields
    from_environment = {}
    for name, value in environment.items():
        if name.startswith(ENV_PREFIX):
            option = name.removeprefix(ENV_PREFIX).lower()
            if option not in fields and option != "config":
                raise SettingsError(
                    f"unknown environment variable {name}"
                    + did_you_mean(name, [ENV_PREFIX + field.upper() for field in fields])
                )
            from_environment[option] = value
    merged = {**from_environment, **flags}
    path = merged.pop("config", None)
    from_file = _read_file(Path(path)) if path else {}
    for name in from_file:
        if name not in fields:
            raise SettingsError(f"{path}: unknown option {name!r}{did_you_mean(name, fields)}")
    try:
        return Settings(**{**from_file, **merged})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        message = problem["msg"].removeprefix("Value error, ")
        if problem["loc"]:
            name = str(problem["loc"][0])
            origin = _flag(name)
            if name not in flags:
                origin = f"{ENV_PREFIX}{name.upper()}" if name in from_environment else f"{path}"
                origin += f" ({name})" if name not in from_environment else ""
            message = f"{origin}: {message}"
        raise SettingsError(message) from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        raw = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # its text quotes the line, which may hold a key
        where = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise SettingsError(f"--config: {path}, {where}: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"--config: {path} cannot be read: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"--config: {path} must hold options, one `name: value` each")
    return {str(name).replace("-", "_"): value for name, value in raw.items()}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _choices(field: FieldInfo) -> str | None:
    """The values of an option that has only a few: {none,int8}."""
    values = [str(v) for v in get_args(field.annotation) if isinstance(v, str)]
    if field.annotation is Truncation:
        values = [v.value for v in Truncation]
    return f"{{{','.join(values)}}}" if values else None


def _is_list(field: FieldInfo) -> bool:
    return isinstance(field.default, list)


def _help(name: str, field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, list):
        default = ",".join(default)
    shown = f" (default: {default})" if default not in (None, "", False) else ""
    return f"{field.description}{shown} [{ENV_PREFIX}{name.upper()}]".replace("%", "%%")
