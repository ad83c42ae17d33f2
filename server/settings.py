"""Every option: its name, its default, its reason, and what it may not be.

One class feeds the flags (`--max-batch-tokens`), the environment (`NV_EMBED_MAX_BATCH_TOKENS`)
and the file of `--config` (`max_batch_tokens: …`). Commands without a server take the part that
they need, by the same names. Knows not where values come from (server/configuration.py).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from model.batch import BATCH_SEQS, CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, Quantization
from model.tokenizer import Truncation
from server.api_keys import (
    ApiKey,
    checked,
    checked_with_names,
    named,
    read_keys,
    read_named_keys,
)
from server.errors import SettingsError

ENV_PREFIX = "NV_EMBED_"
MAX_REQUEST_INPUTS = 2048
"""OpenAI's limit on the inputs of one request."""
MAX_REQUEST_TOKENS = 300_000
"""OpenAI's limit on the tokens summed over one request."""
PATH_OPTIONS = (
    *("model", "uds", "api_key_file", "chat_api_key_file", "tls_certificate", "tls_key", "config"),
)
"""Those whose values may be names of files, which need not be UTF-8."""
EMPTY = "a value is empty: leave the option out, or give it one"
"""The one rule, for flags, environment and file. An unset variable of a shell or a compose file
would otherwise mean much: every address, no key, another model."""
_MOST_COUNT = 2**31 - 1
"""Frames and tensors hold counts in 32 bits."""
_MOST_BYTES = 2**50
_DAY_S = 86_400
_MOST_THREADS = 1024
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


Words = Annotated[list[str], BeforeValidator(_split)]
Keys = Annotated[list[SecretStr], BeforeValidator(checked)]
NamedKeys = Annotated[list[SecretStr], BeforeValidator(checked_with_names)]


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
        le=_MOST_THREADS,
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
    family: Literal[
        "auto",
        "nv-embed",
        "e5-mistral",
        "gritlm",
        "bge-en-icl",
        "bidirectional-mean",
        "nemotron-3-embed",
    ] = Field(
        "auto",
        description="what kind of model it is; auto: by its id, its config.json and its "
        "sentence-transformers files",
    )
    offline: bool = Field(False, description="use the local cache only, never the network")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="working type; auto: bfloat16 on GPUs and on CPUs that multiply it faster "
        "than float32 (which is tried), else float32",
    )
    quantization: Quantization = Field(
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
    fused_kernels: Literal["plain", "triton"] = Field(
        "plain",
        description="what runs between the matrix products on a GPU. plain: torch's operations, "
        "one by one; triton: one kernel for each run of them (needs a C compiler; not yet run on a "
        "GPU: gpu-check compares and times both)",
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
        le=_MOST_COUNT,
        description=f"tokens in one forward; default {GPU_BATCH_TOKENS} on GPUs, "
        f"{CPU_BATCH_TOKENS} on the CPU, where more costs latency and gains no throughput",
    )
    max_input_tokens: int | None = Field(
        None,
        ge=2,
        le=_MOST_COUNT,
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
    token_ids: Literal["reject", "model", "cl100k"] = Field(
        "reject",
        description="requests that send token ids: refuse them, use them as this model's, or read "
        "them as OpenAI's cl100k_base, which LangChain sends by default; requests can choose",
    )
    tiktoken_ranks: Path | None = Field(
        None,
        description="file of cl100k_base's ranks for --token-ids cl100k; by default looked for in "
        "TIKTOKEN_CACHE_DIR, and with litellm and llama-index-core",
    )
    detect_instructions: bool = Field(
        True,
        description="take a request's text that begins as the model's family writes an instruction "
        "(Instruct: ..., then Query: ...) for that instruction and a query",
    )
    allow_truncated_dimensions: bool = Field(
        False,
        description="serve all `dimensions` below the model's: cut and renormalise. Those of "
        "matryoshka_dimensions in its config.json need no flag; for others it was not trained, so "
        "quality is unknown",
    )
    runner: str | None = Field(None, description="hidden: module:factory of another runner")

    @model_validator(mode="after")
    def _ranks_are_read(self) -> Self:
        reads_them = self.token_ids == "cl100k"  # noqa: S105  (no password)
        if self.tiktoken_ranks is not None and not reads_them:
            raise ValueError("--tiktoken-ranks is for --token-ids cl100k")
        return self

    @field_validator("query_instruction")
    @classmethod
    def _none_is_none(cls, value: str) -> str:
        return "" if value.lower() == "none" else value


class KeySettings(ModelSettings):
    """The keys that a server asks for, and one of which its client sends."""

    api_key: NamedKeys = Field(
        [],
        description="key that clients must send as a bearer token, or name:key, whose name then "
        "stands in log lines and metrics; for several repeat the flag. Everybody on the machine "
        "sees it in `ps`: prefer --api-key-file",
    )
    api_key_file: Path | None = Field(
        None,
        description="file with a key, or name:key, in each line, where # begins a comment line; "
        "or JSON: each name with its key or its list of keys",
    )

    def api_keys(self) -> list[ApiKey]:
        """All keys of the flag, the environment and the file. Raises SettingsError."""
        keys = [named(key.get_secret_value()) for key in self.api_key]
        if self.api_key_file is not None:
            keys += read_named_keys(self.api_key_file, "--api-key-file")
        owners: dict[bytes, str] = {}
        for one in keys:
            if owners.setdefault(one.key, one.name) != one.name:
                raise SettingsError("--api-key, --api-key-file: one key has two names")
        return keys


class ChatSettings(KeySettings):
    """The key of another server, which `nv-embed synthesize` asks for texts."""

    chat_api_key: Keys = Field(
        [],
        description="key of the server at --chat-url. Everybody on the machine sees it in `ps`: "
        "prefer --chat-api-key-file",
    )
    chat_api_key_file: Path | None = Field(None, description="file that holds it")

    def chat_api_keys(self) -> list[bytes]:
        """All keys, none of which has a name: they are another server's. Raises SettingsError."""
        keys = [key.get_secret_value() for key in self.chat_api_key]
        if self.chat_api_key_file is not None:
            keys += read_keys(self.chat_api_key_file, "--chat-api-key-file")
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
        BATCH_SEQS,
        ge=1,
        le=_MOST_COUNT,
        description="inputs in one forward; more would gain nothing",
    )
    max_queued_tokens: int = Field(
        1_000_000,
        ge=1,
        le=_MOST_COUNT,
        description="tokens that may wait; beyond it requests get 429 and Retry-After",
    )
    max_key_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="part of --max-queued-tokens that the requests of one name's keys may take; "
        "beyond it they get 429, and the others do not. Needs keys with names",
    )
    min_ready_workers: int = Field(
        1,
        ge=1,
        le=_MOST_COUNT,
        description="with fewer ready workers /readyz answers 503, so that a load balancer goes "
        "elsewhere; requests that come nevertheless are served",
    )
    exit_after_failed_starts: int | None = Field(
        None,
        ge=1,
        le=_MOST_COUNT,
        description="end with status 1 when so many workers have failed to start so many times in "
        "a row that --min-ready-workers cannot be met; default: try for ever, once it has served",
    )
    cache_bytes: int = Field(
        0,
        ge=0,
        le=_MOST_BYTES,
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
        32 * 1024 * 1024,
        ge=1024,
        le=_MOST_BYTES,
        description="largest request body; beyond it a 413",
    )
    max_inflight_bytes: int = Field(
        1024**3,
        ge=1024,
        le=_MOST_BYTES,
        description="bytes of bodies and answers in memory at once; beyond it requests get 429",
    )
    docs: bool = Field(True, description="serve /docs, /redoc and /openapi.json")
    playground: bool = Field(True, description="serve a page at / to try the model in a browser")
    metrics_need_key: bool = Field(
        False, description="ask for an API key at /metrics, too, when there are keys"
    )
    tls_certificate: Path | None = Field(None, description="PEM file: serve https with it")
    tls_key: Path | None = Field(None, description="PEM file with the certificate's private key")
    max_connections: int = Field(
        4096,
        ge=1,
        le=_MOST_COUNT,
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
    max_connection_age: float | None = Field(
        None,
        gt=0,
        le=_DAY_S,
        description="seconds after which, at most, a connection's next answer closes it, so that "
        "clients that keep theirs find new servers; default: never",
    )
    drain_delay: float = Field(
        0.0,
        ge=0,
        le=_DAY_S,
        description="seconds after SIGTERM, SIGINT or SIGHUP in which /readyz already answers 503 "
        "and requests are still served: as long as a load balancer takes to notice",
    )
    drain_timeout: float = Field(
        30.0,
        ge=0,
        le=_DAY_S,
        description="seconds to finish accepted requests after that",
    )
    access_log: bool = Field(True, description="one line per request, without its texts")
    otlp_endpoint: str | None = Field(
        None,
        description="send traces to this OpenTelemetry collector by OTLP over HTTP, such as "
        "http://collector:4318 (extra otel); default: what OTEL_EXPORTER_OTLP_ENDPOINT says, else "
        "none are made",
    )
    trace_sample: float | None = Field(
        None,
        ge=0,
        le=1,
        description="part of the traces that begin here which is sent; those of callers go by "
        "their own sampled flag. Default: what OTEL_TRACES_SAMPLER says, else 0.01",
    )

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

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not _is_url(value):
            raise ValueError("must be a URL, as in http://collector:4318")
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
SettingsT = TypeVar("SettingsT", bound=MachineSettings)


def _is_url(text: str) -> bool:
    """Of a place that is spoken to over HTTP, and no more than that."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (raises for what is no number)
    except ValueError:
        return False
    plain = re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", text)
    return bool(plain and parts.hostname)
