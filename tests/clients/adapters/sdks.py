"""The SDKs of providers and of other servers, plain HTTP, and small libraries over them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from typing import Any

from tests.clients.adapters.rerankers import (  # noqa: F401
    baseten_rerank,
    cohere_rerank,
    infinity_rerank,
    tei_rerank,
    voyage_rerank,
)
from tests.clients.adapters.ways import At, Ways


def rows(answer: Any) -> list[Any]:
    return [row.embedding for row in answer.data]


def openai_sync(at: At) -> Ways:
    from openai import OpenAI

    client = OpenAI(base_url=at.v1, api_key=at.key)
    return Ways(lambda texts: rows(client.embeddings.create(model=at.model, input=texts)))


def openai_async(at: At) -> Ways:
    from openai import AsyncOpenAI

    async def ask(texts: list[str]) -> Any:
        async with AsyncOpenAI(base_url=at.v1, api_key=at.key) as client:
            return await client.embeddings.create(model=at.model, input=texts)

    return Ways(lambda texts: rows(asyncio.run(ask(texts))))


def openai_input_type(at: At) -> Ways:
    from openai import OpenAI

    client = OpenAI(base_url=at.v1, api_key=at.key)

    def ask(texts: list[str], side: str) -> list[Any]:
        extra = {"input_type": side}
        return rows(client.embeddings.create(model=at.model, input=texts, extra_body=extra))

    return Ways(lambda texts: ask(texts, "passage"), lambda text: ask([text], "query")[0])


def openai_azure(at: At) -> Ways:
    from openai import AzureOpenAI

    client = AzureOpenAI(azure_endpoint=at.url, api_key=at.key, api_version="2024-10-21")
    return Ways(lambda texts: rows(client.embeddings.create(model=at.model, input=texts)))


def by_requests(at: At) -> Ways:
    import requests

    def ask(texts: list[str]) -> list[Any]:
        headers = {"Authorization": f"Bearer {at.key}"}
        body = {"model": at.model, "input": texts}
        answer = requests.post(f"{at.v1}/embeddings", json=body, headers=headers, timeout=60)
        if not answer.ok:
            raise RuntimeError(answer.text)
        return [row["embedding"] for row in answer.json()["data"]]

    return Ways(ask)


def by_aiohttp(at: At) -> Ways:
    import aiohttp

    async def ask(texts: list[str]) -> list[Any]:
        headers = {"Authorization": f"Bearer {at.key}"}
        body = {"model": at.model, "input": texts}
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(f"{at.v1}/embeddings", json=body) as answer,
        ):
            if not answer.ok:
                raise RuntimeError(await answer.text())
            return [row["embedding"] for row in (await answer.json())["data"]]

    return Ways(lambda texts: asyncio.run(ask(texts)))


def by_curl(at: At) -> Ways:
    def ask(texts: list[str]) -> list[Any]:
        command = ["curl", "-s", f"{at.v1}/embeddings", "-d", "@-"]
        command += ["-H", f"Authorization: Bearer {at.key}", "-H", "Content-Type: application/json"]
        body = json.dumps({"model": at.model, "input": texts})
        done = subprocess.run(command, input=body, capture_output=True, text=True, check=True)
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise RuntimeError(done.stdout)
        return [row["embedding"] for row in answer["data"]]

    return Ways(ask)


def cohere_v2(at: At) -> Ways:
    import cohere

    client = cohere.ClientV2(api_key=at.key, base_url=at.url)

    def ask(texts: list[str], side: str) -> Any:
        answer = client.embed(
            texts=texts, model=at.model, input_type=side, embedding_types=["float"]
        )
        return answer.embeddings.float_

    return Ways(
        lambda texts: ask(texts, "search_document"), lambda text: ask([text], "search_query")[0]
    )


def cohere_v1(at: At) -> Ways:
    import cohere

    client = cohere.Client(api_key=at.key, base_url=at.url)

    def ask(texts: list[str], side: str) -> Any:
        return client.embed(texts=texts, model=at.model, input_type=side).embeddings

    return Ways(
        lambda texts: ask(texts, "search_document"), lambda text: ask([text], "search_query")[0]
    )


def voyage(at: At) -> Ways:
    import voyageai

    client = voyageai.Client(api_key=at.key, base_url=at.v1)

    def ask(texts: list[str], side: str) -> Any:
        # Its default is to cut what is too long.
        answer = client.embed(texts, model=at.model, input_type=side, truncation=False)
        return answer.embeddings

    return Ways(lambda texts: ask(texts, "document"), lambda text: ask([text], "query")[0])


def hugging_face(at: At) -> Ways:
    from huggingface_hub import InferenceClient

    client = InferenceClient(at.url, token=at.key)
    return Ways(lambda texts: [client.feature_extraction(text)[0] for text in texts])


def ollama_embed(at: At) -> Ways:
    import ollama

    client = ollama.Client(host=at.url, headers={"Authorization": f"Bearer {at.key}"})
    return Ways(lambda texts: client.embed(at.model, texts).embeddings)


def ollama_embeddings(at: At) -> Ways:
    import ollama

    client = ollama.Client(host=at.url, headers={"Authorization": f"Bearer {at.key}"})
    return Ways(lambda texts: [client.embeddings(at.model, text).embedding for text in texts])


def infinity(at: At) -> Ways:
    from infinity_client import AuthenticatedClient
    from infinity_client.api.default import embeddings
    from infinity_client.models import OpenAIEmbeddingInputText

    client = AuthenticatedClient(base_url=at.v1, token=at.key)

    def ask(texts: list[str]) -> list[Any]:
        body = OpenAIEmbeddingInputText(input_=texts, model=at.model)
        answer = embeddings.sync_detailed(client=client, body=body)
        if answer.status_code != 200:
            raise RuntimeError(answer.content.decode())
        return rows(answer.parsed)

    return Ways(ask)


def tei(at: At) -> Ways:
    from tei_client import HttpClient

    client = HttpClient(at.url, headers={"Authorization": f"Bearer {at.key}"})
    return Ways(lambda texts: [client.embed(text)[0] for text in texts])


def baseten(at: At) -> Ways:
    from baseten_performance_client import PerformanceClient

    client = PerformanceClient(at.url, at.key)
    return Ways(lambda texts: [row.embedding for row in client.embed(texts, at.model).data])


def llm(at: At) -> Ways:
    """It knows OpenAI's names alone, and takes another base URL from a file."""
    from llm.default_plugins.openai_models import OpenAIEmbeddingModel

    os.environ["OPENAI_BASE_URL"] = at.v1
    model = OpenAIEmbeddingModel("3-small", at.model)
    model.key = at.key
    return Ways(lambda texts: list(model.embed_multi(texts)))


def pydantic_ai(at: At) -> Ways:
    from pydantic_ai import Embedder
    from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=at.v1, api_key=at.key)
    model = Embedder(OpenAIEmbeddingModel(at.model, provider=provider))

    async def documents(texts: list[str]) -> Any:
        return (await model.embed_documents(texts)).embeddings

    async def query(text: str) -> Any:
        return (await model.embed_query(text)).embeddings[0]

    return Ways(lambda texts: asyncio.run(documents(texts)), lambda text: asyncio.run(query(text)))


def agno(at: At) -> Ways:
    from agno.knowledge.embedder.openai import OpenAIEmbedder

    width = int(at.argument) if at.argument else None
    embedder = OpenAIEmbedder(id=at.model, base_url=at.v1, api_key=at.key, dimensions=width)

    def ask(texts: list[str]) -> list[Any]:
        vectors = [embedder.get_embedding(text) for text in texts]
        if not all(vectors):
            raise RuntimeError("an empty vector; the error is in the log alone")
        return vectors

    return Ways(ask)


def chroma(at: At) -> Ways:
    from chromadb.utils.embedding_functions import OpenAIEmbeddingFunction

    embed = OpenAIEmbeddingFunction(api_key=at.key, model_name=at.model, api_base=at.v1)
    return Ways(embed, lambda text: embed.embed_query([text])[0])


def chroma_hugging_face(at: At) -> Ways:
    from chromadb.utils.embedding_functions import HuggingFaceEmbeddingServer

    return Ways(HuggingFaceEmbeddingServer(url=f"{at.url}/embed", api_key=at.key))


def chroma_ollama(at: At) -> Ways:
    from chromadb.utils.embedding_functions import OllamaEmbeddingFunction

    return Ways(OllamaEmbeddingFunction(url=at.url, model_name=at.model))


def lancedb(at: At) -> Ways:
    from lancedb.embeddings import get_registry

    os.environ["OPENAI_API_KEY"] = at.key
    embed = get_registry().get("openai").create(name=at.model, base_url=at.v1, dim=256)
    return Ways(
        embed.compute_source_embeddings, lambda text: embed.compute_query_embeddings(text)[0]
    )
