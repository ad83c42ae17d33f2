"""Wire types only: what comes in over HTTP, and what goes out, for the OpenAPI document.

Answers are written by `serialize`; their models here document them. Null means absent in every
optional field, and unknown fields are ignored: clients send many, but for those of REFUSED, which
would change the numbers. (`/tokenize` knows those of
`/v1/embeddings`, too, so that one body serves for both.)
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.tokenizer import Truncation
from server.api.vector_format import OutputDtype
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_INPUTS

REFUSED = {
    "messages": "chat messages are not embedded: send texts as `input`",
    "images": "this model embeds texts: send them as `input`",
    "image": "this model embeds texts: send them as `input`",
}
"""Fields that would change the numbers, and have no value that is right here; with the reason."""
UNFOLDED = frozenset({"extra_body", "embedding_types"})
"""Known, and read into other fields."""
_TOKENS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2}
_INPUT_SCHEMA = {
    "description": "One text, or up to 2,048; or token ids of one input or of several (see "
    "`token_ids`); this model's go from BOS (1) to EOS (2).",
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


def truncation(value: object) -> object:
    if isinstance(value, bool):
        return Truncation.END if value else Truncation.NONE
    named = lower(value)
    return _SIDES_CUT.get(named, named) if isinstance(named, str) else named


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


_SIDES_CUT = {"right": Truncation.END, "left": Truncation.START}
_DTYPES = {"float": "float32"}


def _dtype(value: object) -> object:
    named = lower(value)
    return _DTYPES.get(named, named) if isinstance(named, str) else named


def _zero_is_absent(value: object) -> object:
    return None if value == 0 and type(value) is int else value


def must_be(right: bool) -> Any:
    """A boolean that has one value here."""

    def check(value: bool | None) -> bool | None:
        if value is (not right):
            raise PydanticCustomError(
                "literal_error", "Input should be {right}", {"right": str(right).lower()}
            )
        return value

    return (
        AfterValidator(check),
        WithJsonSchema({"anyOf": [{"const": right, "type": "boolean"}, {"type": "null"}]}),
    )


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_value_each(cls, body: object) -> object:
        """Before names are matched: a null in one of a field's names must not hide another, nor one
        value another."""
        if not isinstance(body, dict):
            return body
        found = cls._unfolded({k: value for k, value in body.items() if value is not None})
        twice: dict[str, str] = {}
        others = cls.other_names()
        for name in found:
            field = others.get(name)
            if field is None:
                continue
            first = twice.setdefault(field, name)
            if first != name and found[first] != found[name]:
                raise InvalidRequestError(
                    f"{name} and {first} are one field here, and their values differ", param=name
                )
        return found

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        """In the fields' own form, and without those that nobody can honour."""
        return body

    @classmethod
    @functools.cache
    def other_names(cls) -> dict[str, str]:
        """Of the fields that have several: name -> field."""
        return {
            str(choice): name
            for name, field in cls.model_fields.items()
            if isinstance(field.validation_alias, AliasChoices)
            for choice in field.validation_alias.choices
        }


class FewShotExample(Wire):
    """One query of a task and what answers it."""

    instruction: StrictStr = Field(validation_alias=AliasChoices("instruction", "instruct"))
    query: StrictStr
    response: StrictStr


class InstructedInput(Wire):
    """Inputs, and the fields that decide their instruction; see README, Instructions."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    prompt: StrictStr | None = Field(None, description="Prefix, used verbatim.")
    suffix: StrictStr | None = Field(None, description="Behind each text, used verbatim.")
    instruction: StrictStr | None = Field(
        None,
        description="Task description, in the template of the model's family; NV-Embed's prefix "
        "is `Instruct: {instruction}\\nQuery: `.",
    )
    examples: Annotated[list[FewShotExample] | None, Field(max_length=64)] = Field(
        None,
        description="Queries of the task with their answers, before the prefix (bge-en-icl only).",
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
        BeforeValidator(truncation),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "boolean"},
                    {
                        "type": "string",
                        "pattern": "^([Nn][Oo][Nn][Ee]|[Ee][Nn][Dd]|[Ss][Tt][Aa][Rr][Tt]"
                        "|[Rr][Ii][Gg][Hh][Tt]|[Ll][Ee][Ff][Tt])$",
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        None,
        validation_alias=AliasChoices("truncate", "truncation"),
        description="Too long inputs: false/NONE refuses them, true/END/RIGHT keeps the first "
        "tokens, START/LEFT keeps the instruction and the last tokens.",
    )
    truncation_side: Annotated[
        Literal["left", "right"] | None,
        BeforeValidator(lower),
        WithJsonSchema(
            {
                "anyOf": [
                    {
                        "type": "string",
                        "pattern": "^([Rr][Ii][Gg][Hh][Tt]|[Ll][Ee][Ff][Tt])$",
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        None,
        validation_alias=AliasChoices("truncation_side", "truncation_direction"),
        description="Where a too long input is cut, beside `truncate: true` or "
        "`truncate_prompt_tokens`: right keeps the first tokens, left the last ones.",
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

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name, why in REFUSED.items():
            if name in body:
                raise InvalidRequestError(f"{name}: {why}", param=name)
        return body

    token_ids: Literal["reject", "model", "cl100k"] | None = Field(
        None,
        description="Whose ids `input` holds: this model's, used verbatim, or OpenAI's cl100k_base "
        "(where the server reads them); by default as --token-ids says.",
    )
    add_special_tokens: Annotated[StrictBool | None, *must_be(True)] = Field(
        None, description="BOS, and EOS where the model has it, are part of an input."
    )


EMBEDDINGS_PATHS = ("/v1/embeddings", "/embeddings")
"""Where an EmbeddingsRequest may be sent; the first is the documented one."""


class EmbeddingsRequest(InstructedInput):
    """OpenAI's CreateEmbeddingRequest, and the optional fields above."""

    model: StrictStr | None = Field(None, description="By default the one that is served.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="float (the default): a list of numbers; or base64 of their bytes."
    )
    output_dtype: Annotated[
        OutputDtype | None,
        BeforeValidator(_dtype),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string", "enum": ["float", *get_args(OutputDtype)]},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        None,
        validation_alias=AliasChoices("output_dtype", "embed_dtype", "embedding_type"),
        description="Of the numbers: float32 (or float; the default), float16, int8, uint8, "
        "binary or ubinary (a bit a number, eight to a byte).",
    )
    endianness: Literal["native", "little", "big"] | None = Field(
        None, description="Of float32 and float16 in base64: little (the default) or big."
    )
    dimensions: Annotated[
        StrictInt | None,
        BeforeValidator(_zero_is_absent),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}),
    ] = Field(
        None,
        ge=1,
        validation_alias=AliasChoices("dimensions", "output_dimension"),
        description="The model's own width (also as 0); smaller ones need "
        "--allow-truncated-dimensions.",
    )
    normalize: Annotated[StrictBool | None, *must_be(True)] = Field(
        None,
        validation_alias=AliasChoices("normalize", "normalized", "use_activation", "activation"),
        description="Vectors have length 1.",
    )
    late_chunking: Annotated[StrictBool | None, *must_be(False)] = Field(
        None,
        validation_alias=AliasChoices("late_chunking", "return_multivector"),
        description="An input has one vector.",
    )
    user: Any = Field(None, description="Ignored.")

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        """What some libraries send in a form of their own."""
        if "extra_body" in body:
            body = _with_extra_body(body)
        if (types := body.get("embedding_types")) is not None:
            if not isinstance(types, list) or len(types) != 1 or types[0] is None:
                raise InvalidRequestError(
                    "embedding_types: an answer has one type here: a list of one, or output_dtype",
                    param="embedding_types",
                )
            body = {"embedding_type": types[0], **body}
        if body.get("embedding_type") == "base64":  # Jina's name for encoding_format
            body = {"encoding_format": "base64", **body}
            del body["embedding_type"]
        return super()._unfolded(body)


def _with_extra_body(body: dict[str, Any]) -> dict[str, Any]:
    """With the fields of a nested `extra_body`, which LiteLLM sends as it got it."""
    rest = dict(body)
    extra = rest.pop("extra_body")
    if not isinstance(extra, dict):
        raise InvalidRequestError("extra_body must be an object", param="extra_body")
    for name, value in extra.items():
        if value is not None and rest.setdefault(name, value) != value:
            raise InvalidRequestError(f"{name} is another in extra_body", param=name)
    return rest


class TokenizeRequest(InstructedInput):
    model: StrictStr | None = None

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        """TEI's `inputs`, and vLLM's `prompt` where it stands alone."""
        for name in ("inputs", "prompt"):
            if "input" not in body and name in body:
                body = {**body, "input": body[name]}
                del body[name]
        return super()._unfolded(body)


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
    suffix: str
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
    family: str
    template: str | None = Field(
        description="The prefix of a text with an instruction, in place of `{task}`; null: this "
        "family takes no instruction."
    )
    prompts: dict[str, str] = Field(
        description="What stands before a query and a passage by default, and the prompts of the "
        "model's own files, by name."
    )
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
    family: str
    mask: Literal["full", "causal"]
    pooler: Literal["latent", "mean", "last"]
    template: str | None
    truncated_inputs: Literal["keep EOS", "lose EOS", "have none"]
    dimensions: int
    model_id: str
    model_sha: str
    sha: str
    docker_label: None
    model_dtype: str
    model_type: dict[str, dict[str, str]]
    max_input_length: int
    max_batch_tokens: int
    max_batch_requests: int
    max_client_batch_size: int
    max_concurrent_requests: int
    auto_truncate: bool
    tokenization_workers: int
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
    detail: str = Field(description="error.message once more.")
