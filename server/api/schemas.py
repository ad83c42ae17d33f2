"""What comes in over HTTP, in OpenAI's words and this server's own.

Unknown fields are ignored, for clients send many; those of REFUSED are not, which would change the
numbers. `/tokenize` knows the fields of `/v1/embeddings`, so that one body serves for both.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    PlainValidator,
    StrictBool,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)

from model.chunks import Chunks
from model.tokenizer import Truncation
from server.api.chunks import CHUNKS_SCHEMA, chunks_of
from server.api.vector_format import OutputDtype
from server.api.wire import Wire, lower, must_be, or_named, truncation_or_average
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
_DTYPES = {"float": "float32"}


def _dtype(value: object) -> object:
    named = lower(value)
    return _DTYPES.get(named, named) if isinstance(named, str) else named


def _zero_is_absent(value: object) -> object:
    return None if value == 0 and type(value) is int else value


class FewShotExample(Wire):
    """One query of a task and what answers it."""

    instruction: Annotated[StrictStr, or_named("instruct")]
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
    input_type: Annotated[StrictStr | None, or_named("prompt_name")] = Field(
        None,
        description="query or search_query: the server's query instruction. passage, document or "
        "search_document: none.",
    )
    truncate: Annotated[
        Truncation | Literal["average"] | None,
        or_named("truncation"),
        PlainValidator(truncation_or_average),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "boolean"},
                    {
                        "type": "string",
                        "pattern": "^([Nn][Oo][Nn][Ee]|[Ee][Nn][Dd]|[Ss][Tt][Aa][Rr][Tt]"
                        "|[Rr][Ii][Gg][Hh][Tt]|[Ll][Ee][Ff][Tt]|[Aa][Vv][Ee][Rr][Aa][Gg][Ee])$",
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(
        None,
        description="Too long inputs: false/NONE refuses them, true/END/RIGHT keeps the first "
        "tokens, START/LEFT keeps the instruction and the last tokens, AVERAGE splits a text into "
        "parts that fit and averages their vectors by length.",
    )
    truncation_side: Annotated[
        Literal["left", "right"] | None,
        or_named("truncation_direction"),
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
        or_named("embed_dtype", "embedding_type"),
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
        description="Of the numbers: float32 (or float; the default), float16, int8, uint8, "
        "binary or ubinary (a bit a number, eight to a byte).",
    )
    endianness: Literal["native", "little", "big"] | None = Field(
        None, description="Of float32 and float16 in base64: little (the default) or big."
    )
    dimensions: Annotated[
        StrictInt | None,
        or_named("output_dimension"),
        BeforeValidator(_zero_is_absent),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]}),
    ] = Field(
        None,
        ge=1,
        description="The model's own width (also as 0); smaller ones need "
        "--allow-truncated-dimensions.",
    )
    normalize: Annotated[
        StrictBool | None,
        or_named("normalized", "use_activation", "activation"),
        *must_be(True),
    ] = Field(None, description="Vectors have length 1.")
    late_chunking: Annotated[StrictBool | None, or_named("return_multivector"), *must_be(False)] = (
        Field(None, description="An input has one vector.")
    )
    chunks: Annotated[Chunks | None, BeforeValidator(chunks_of), WithJsonSchema(CHUNKS_SCHEMA)] = (
        Field(
            None,
            description="Of one text: a vector for each run of it, out of one forward of the whole "
            "(late chunking). A number of tokens, or runs [first, behind the last] of its "
            'characters, or {"tokens": runs}. Each vector comes with its `chunk`.',
        )
    )
    cache_salt: Annotated[str | None, Field(strict=True, min_length=1, max_length=1024)] = Field(
        None,
        description="Vectors that are cached, or are being computed, are shared with requests of "
        "the same salt alone: no other tenant sees by its speed what was asked before.",
    )
    priority: Annotated[int, Field(strict=True, ge=-10, le=10)] | None = Field(
        None,
        description="Of what waits, the lower comes sooner (0: the default). Within a level "
        "requests take turns, and no level waits for ever.",
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
