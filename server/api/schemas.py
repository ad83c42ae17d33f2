"""Wire types only: what comes in over HTTP, and what goes out, for the OpenAPI document.

Answers are written by `serialize`; their models here document them. Null means absent in every
optional field, and unknown fields are ignored: clients send many. (`/tokenize` knows those of
`/v1/embeddings`, too, so that one body serves for both.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    WithJsonSchema,
    model_validator,
)

from model.tokenizer import Truncation
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


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: object) -> object:
        """Before names are matched: a null in one of a field's names must not hide another."""
        if isinstance(body, dict):
            return {name: value for name, value in body.items() if value is not None}
        return body


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


EMBEDDINGS_PATHS = ("/v1/embeddings", "/embeddings")
"""Where an EmbeddingsRequest may be sent; the first is the documented one."""


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
