"""LiteLLM, and what asks through it."""

from __future__ import annotations

import os
from typing import Any

import litellm as package

from tests.clients.adapters.ways import At, Ranks, Ways, in_order

package.suppress_debug_info = True


def embedding(at: At) -> Ways:
    """`argument` is the provider's prefix."""
    base = at.url if at.argument == "ollama" else at.v1

    def ask(texts: list[str], **fields: Any) -> list[Any]:
        answer = package.embedding(
            f"{at.argument}/{at.model}", texts, api_base=base, api_key=at.key, **fields
        )
        return [row["embedding"] for row in answer.data]

    return Ways(ask, lambda text: ask([text], input_type="query")[0])


def azure(at: At) -> Ways:
    def ask(texts: list[str]) -> list[Any]:
        answer = package.embedding(
            f"azure/{at.model}",
            texts,
            api_base=at.url,
            api_key=at.key,
            api_version="2024-10-21",
        )
        return [row["embedding"] for row in answer.data]

    return Ways(ask)


def cohere(at: At) -> Ways:
    def ask(texts: list[str], side: str) -> list[Any]:
        answer = package.embedding(
            f"cohere/{at.model}",
            texts,
            api_base=f"{at.url}/v1/embed",
            api_key=at.key,
            input_type=side,
        )
        return [row["embedding"] for row in answer.data]

    return Ways(
        lambda texts: ask(texts, "search_document"), lambda text: ask([text], "search_query")[0]
    )


def langchain(at: At) -> Ways:
    from langchain_litellm import LiteLLMEmbeddings

    model = LiteLLMEmbeddings(model=f"openai/{at.model}", api_base=at.v1, api_key=at.key)
    return Ways(model.embed_documents, model.embed_query)


def llama_index(at: At) -> Ways:
    from llama_index.embeddings.litellm import LiteLLMEmbedding

    model = LiteLLMEmbedding(model_name=f"openai/{at.model}", api_base=at.v1, api_key=at.key)
    return Ways(model.get_text_embedding_batch, model.get_query_embedding)


def dspy(at: At) -> Ways:
    os.environ["DSPY_CACHEDIR"] = os.devnull
    from dspy import Embedder

    model = Embedder(f"openai/{at.model}", api_base=at.v1, api_key=at.key, caching=False)
    return Ways(model)


def rerank(at: At) -> Ranks:
    """`argument` is the provider's prefix."""

    def scores(query: str, texts: list[str]) -> list[float]:
        base = at.url if at.argument == "cohere" else at.v1
        answer = package.rerank(
            f"{at.argument}/{at.model}", query, texts, api_base=base, api_key=at.key
        )
        return in_order(answer.results, "index", "relevance_score")

    return Ranks(scores)
