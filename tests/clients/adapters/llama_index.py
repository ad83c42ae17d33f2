"""LlamaIndex's packages."""

from __future__ import annotations

from typing import Any

from tests.clients.adapters.ways import At, Ways


def both(embedding: Any) -> Ways:
    return Ways(embedding.get_text_embedding_batch, embedding.get_query_embedding)


def openai(at: At) -> Ways:
    from llama_index.embeddings.openai import OpenAIEmbedding

    default = at.model == "text-embedding-ada-002"
    name = {} if default else {"model_name": at.model}
    return both(OpenAIEmbedding(**name, api_base=at.v1, api_key=at.key, max_retries=0))


def openai_like(at: At) -> Ways:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    return both(
        OpenAILikeEmbedding(model_name=at.model, api_base=at.v1, api_key=at.key, max_retries=0)
    )


def azure(at: At) -> Ways:
    from llama_index.embeddings.azure_openai import AzureOpenAIEmbedding

    return both(
        AzureOpenAIEmbedding(
            deployment_name=at.model,
            azure_endpoint=at.url,
            api_key=at.key,
            api_version="2024-10-21",
            max_retries=0,
        )
    )


def nvidia(at: At) -> Ways:
    from llama_index.embeddings.nvidia import NVIDIAEmbedding

    return both(NVIDIAEmbedding(model=at.model, base_url=at.v1, api_key=at.key, max_retries=0))


def tei(at: At) -> Ways:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    return both(
        TextEmbeddingsInference(
            model_name=at.model,
            base_url=at.url,
            auth_token=at.key,
            truncate_text=False,
        )
    )


def cohere(at: At) -> Ways:
    from llama_index.embeddings.cohere import CohereEmbedding

    return both(CohereEmbedding(model_name=at.model, base_url=at.url, api_key=at.key))


def ollama(at: At) -> Ways:
    from llama_index.embeddings.ollama import OllamaEmbedding

    headers = {"Authorization": f"Bearer {at.key}"}
    return both(
        OllamaEmbedding(model_name=at.model, base_url=at.url, client_kwargs={"headers": headers})
    )
