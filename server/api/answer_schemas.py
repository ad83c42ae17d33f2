"""What goes out over HTTP, for the OpenAPI document: `serialize` and the endpoints write it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Chunk(BaseModel):
    """Runs from the first to behind the last."""

    characters: tuple[int, int]
    tokens: tuple[int, int] = Field(description="Of the text's own.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    chunk: Chunk | None = Field(None, description="What it is of, where `chunks` was sent.")


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
    index: int = Field(description="Of the input; parts of one that is AVERAGEd have the same.")
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
    matryoshka_dimensions: list[int]
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
