"""Wire types only: what comes in over HTTP, and what goes out, for the OpenAPI document.

Answers are written by `serialize`; their models here document them. Null means absent in every
optional field, and unknown fields are ignored: clients send many. (`/tokenize` knows those of
`/v1/embeddings`, too, so that one body serves for both.)
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from model.tokenizer import Truncation
from server.api import json_fields
from server.api.json_text import JSONTextError, loads
from server.engine.interface import Input
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_INPUTS

_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2}
_INPUT_SCHEMA = {
    "description": "One text, or up to 2,048; or token ids of one input or of several, each from "
    "BOS (1) to EOS (2), used verbatim.",
    "oneOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "array",
            "items": {"type": "string", "minLength": 1},
            "minItems": 1,
            "maxItems": MAX_REQUEST_INPUTS,
        },
        _TOKENS_SCHEMA,
        {
            "type": "array",
            "items": _TOKENS_SCHEMA,
            "minItems": 1,
            "maxItems": MAX_REQUEST_INPUTS,
        },
    ],
}


def _truncation(value: object) -> object:
    if isinstance(value, bool):
        return Truncation.END if value else Truncation.NONE
    return value.lower() if isinstance(value, str) else value


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: object) -> object:
        """Before names are matched: a null in one of a field's names must not hide another."""
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body


W = TypeVar("W", bound="_Wire")
_UNUSED = frozenset({"user"})
"""Known, and ignored whatever they are."""


class InstructedInput(_Wire):
    """Inputs, and the fields that decide their instruction; see README, Instructions."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    prompt: StrictStr | None = Field(None, description="Prefix, used verbatim.")
    instruction: StrictStr | None = Field(
        None, description="Task description: the prefix is `Instruct: {instruction}\\nQuery: `."
    )
    task: StrictStr | None = Field(
        None, description="Name of a task that GET /v1/instructions lists."
    )
    input_type: StrictStr | None = Field(
        None,
        validation_alias=AliasChoices("input_type", "prompt_name"),
        description="query or search_query: the server's query instruction. passage, document or "
        "search_document: none.",
    )
    truncate: Annotated[
        Truncation | None,
        BeforeValidator(_truncation),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "boolean"},
                    {"type": "string", "enum": ["NONE", "END", "START", "none", "end", "start"]},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        None,
        validation_alias=AliasChoices("truncate", "truncation"),
        description="Too long inputs: false/NONE refuses them, true/END keeps the first tokens, "
        "START keeps the instruction and the last tokens.",
    )
    truncate_prompt_tokens: Annotated[
        StrictInt | None,
        WithJsonSchema(
            {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 2}, {"type": "null"}]}
        ),
    ] = Field(
        None,
        ge=-1,
        description="Keep this many of the last tokens, -1 for as many as fit (vLLM's field).",
    )


class EmbeddingsRequest(InstructedInput):
    """OpenAI's CreateEmbeddingRequest, and the optional fields above."""

    model: StrictStr
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float (the default) or base64: little-endian float32."
    )
    dimensions: StrictInt | None = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("dimensions", "output_dimension"),
        description="The model's own width; smaller ones need --allow-truncated-dimensions.",
    )
    user: Any = Field(None, description="Ignored.")


class TokenizeRequest(InstructedInput):
    model: StrictStr | None = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Ids that ran: BOS, EOS and instruction counted, after truncation."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class TokenizedInput(BaseModel):
    index: int
    ids: list[int]
    count: int
    instruction_tokens: int = Field(
        description="Leading positions that the instruction takes, BOS included; not pooled."
    )


class TokenizeResponse(BaseModel):
    object: Literal["list"]
    prefix: str
    data: list[TokenizedInput]
    max_input_tokens: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class InstructionTask(BaseModel):
    task: str
    query: str
    passage: str
    source: Literal["nv-embed", "mteb"]


class InstructionList(BaseModel):
    object: Literal["list"]
    data: list[InstructionTask]
    query_instruction: str
    default_input_type: Literal["none", "query", "passage"]


class Device(BaseModel):
    device: str
    device_name: str
    dtype: str
    quantization: str
    attention: str
    cuda_graphs: bool
    fused_kernels: str
    products: dict[str, str] = Field(
        description="on a CPU: who multiplies, by kind of number, as its probe found it"
    )


class Limits(BaseModel):
    max_input_tokens: int
    max_request_inputs: int
    max_request_tokens: int
    max_batch_tokens: list[int]
    max_batch_seqs: int
    max_queued_tokens: int
    max_body_bytes: int


class Info(BaseModel):
    version: str
    model: str
    revision: str | None
    license: str | None
    dimensions: int
    devices: list[Device]
    limits: Limits


class Health(BaseModel):
    status: Literal["ok"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


def parse_body(wire: type[W], body: bytes | bytearray) -> W:
    """JSON bytes as `wire`. Raises InvalidRequestError naming the field."""
    return read_body(wire, body)[0]


def read_body(wire: type[W], body: bytes | bytearray) -> tuple[W, list[str]]:
    """The same, and the names of the fields that nobody knows."""
    known = known_fields(wire)
    try:
        if len(body) <= json_fields.STEP:
            fields = loads(body)
            if not isinstance(fields, dict):
                raise InvalidRequestError("The body must be a JSON object")
            unknown = [] if known.issuperset(fields) else [n for n in fields if n not in known]
        else:
            fields, others = json_fields.read_fields(body, known - _UNUSED)
            unknown = [name for name in others if name not in known]
    except JSONTextError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}") from None
    return parse_fields(wire, fields), unknown


def parse_fields(wire: type[W], fields: dict[str, Any]) -> W:
    """What a JSON object holds as `wire`. Raises InvalidRequestError naming the field."""
    try:
        return wire.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        raise InvalidRequestError(f"you must provide the field '{name}'", param=name)
    raise InvalidRequestError(f"{name}: {problem['msg']}", param=name)


@functools.cache
def known_fields(wire: type[_Wire]) -> frozenset[str]:
    """All names that a body may have, aliases included."""
    names: set[str] = set()
    for name, field in (EmbeddingsRequest.model_fields | wire.model_fields).items():
        alias = field.validation_alias
        names.update([name] if alias is None else map(str, cast(AliasChoices, alias).choices))
    return frozenset(names)


def parse_inputs(value: object) -> list[Input]:
    """The `input` of a request, in all its forms, as a list of inputs."""
    is_ids = isinstance(value, list) and set(map(type, value)) == {int}
    if isinstance(value, str) or is_ids:
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(
            "input must be a string, a list of strings, token ids, or a list of lists of token "
            "ids, and not empty",
            param="input",
        )
    if len(value) > MAX_REQUEST_INPUTS:
        raise InvalidRequestError(
            f"input has {len(value)} items, the limit is {MAX_REQUEST_INPUTS}", param="input"
        )
    if len({type(item) for item in value}) > 1:
        raise InvalidRequestError(
            "input must not mix texts, token ids and other values", param="input"
        )
    for index, item in enumerate(value):
        if problem := _item_problem(item):
            param = "input" if len(value) == 1 else f"input[{index}]"
            raise InvalidRequestError(f"{param} {problem}", param=param)
    return value


def _item_problem(item: object) -> str | None:
    if isinstance(item, str):
        return None if item else "is an empty string: send a text"
    if not isinstance(item, list):
        return "must be a string or a list of token ids"
    if not item:
        return "is an empty list: send token ids"
    return None if set(map(type, item)) == {int} else "must hold token ids, which are integers"
