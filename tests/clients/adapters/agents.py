"""Frameworks of agents and of memory."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.clients.adapters.ways import At, Ways


def semantic_kernel(at: At) -> Ways:
    from openai import AsyncOpenAI
    from semantic_kernel.connectors.ai.open_ai import OpenAITextEmbedding

    async def ask(texts: list[str]) -> Any:
        async with AsyncOpenAI(base_url=at.v1, api_key=at.key) as client:
            service = OpenAITextEmbedding(ai_model_id=at.model, async_client=client)
            return await service.generate_embeddings(texts)

    return Ways(lambda texts: asyncio.run(ask(texts)))


def mem0(at: At) -> Ways:
    from mem0.configs.embeddings.base import BaseEmbedderConfig
    from mem0.embeddings.openai import OpenAIEmbedding

    config = BaseEmbedderConfig(
        model=at.model, api_key=at.key, openai_base_url=at.v1, embedding_dims=256
    )
    model = OpenAIEmbedding(config)
    return Ways(
        lambda texts: [model.embed(text, "add") for text in texts],
        lambda text: model.embed(text, "search"),
    )


def graphiti(at: At) -> Ways:
    from graphiti_core.embedder.openai import OpenAIEmbedder, OpenAIEmbedderConfig

    config = OpenAIEmbedderConfig(
        embedding_model=at.model, api_key=at.key, base_url=at.v1, embedding_dim=256
    )

    async def ask(texts: list[str]) -> Any:
        return await OpenAIEmbedder(config).create_batch(texts)

    async def one(text: str) -> Any:
        return await OpenAIEmbedder(config).create(text)

    return Ways(lambda texts: asyncio.run(ask(texts)), lambda text: asyncio.run(one(text)))
