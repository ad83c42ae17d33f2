"""LangChain's packages."""

from __future__ import annotations

from typing import Any

from tests.clients.adapters.ways import At, Ranks, Ways, in_order


def both(embeddings: Any) -> Ways:
    return Ways(embeddings.embed_documents, embeddings.embed_query)


def openai(at: At) -> Ways:
    from langchain_openai import OpenAIEmbeddings

    return both(
        OpenAIEmbeddings(
            model=at.model,
            base_url=at.v1,
            api_key=at.key,
            check_embedding_ctx_length=at.argument == "defaults",
        )
    )


def azure(at: At) -> Ways:
    from langchain_openai import AzureOpenAIEmbeddings

    return both(
        AzureOpenAIEmbeddings(
            model=at.model,
            azure_endpoint=at.url,
            api_key=at.key,
            api_version="2024-10-21",
            check_embedding_ctx_length=False,
        )
    )


def nvidia(at: At) -> Ways:
    from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings

    return both(NVIDIAEmbeddings(model=at.model, base_url=at.v1, api_key=at.key))


def community_infinity(at: At) -> Ways:
    from langchain_community.embeddings import InfinityEmbeddings

    return both(InfinityEmbeddings(model=at.model, infinity_api_url=at.v1))


def community_voyage(at: At) -> Ways:
    from langchain_community.embeddings import VoyageEmbeddings

    return both(
        VoyageEmbeddings(
            model=at.model,
            voyage_api_base=f"{at.v1}/embeddings",
            voyage_api_key=at.key,
            batch_size=8,
            max_retries=1,
            truncation=False,
        )
    )


def community_openai(at: At) -> Ways:
    from langchain_community.embeddings import OpenAIEmbeddings

    return both(OpenAIEmbeddings(model=at.model, openai_api_base=at.v1, openai_api_key=at.key))


def community_ollama(at: At) -> Ways:
    from langchain_community.embeddings import OllamaEmbeddings

    headers = {"Authorization": f"Bearer {at.key}"}
    return both(
        OllamaEmbeddings(
            model=at.model,
            base_url=at.url,
            embed_instruction="",
            query_instruction="",
            headers=headers,
        )
    )


def community_llamafile(at: At) -> Ways:
    from langchain_community.embeddings import LlamafileEmbeddings

    return both(LlamafileEmbeddings(base_url=at.url))


def community_localai(at: At) -> Ways:
    from langchain_community.embeddings import LocalAIEmbeddings

    return both(LocalAIEmbeddings(model=at.model, openai_api_base=at.v1, openai_api_key=at.key))


def cohere(at: At) -> Ways:
    from langchain_cohere import CohereEmbeddings

    return both(CohereEmbeddings(model=at.model, base_url=at.url, cohere_api_key=at.key))


def ollama(at: At) -> Ways:
    from langchain_ollama import OllamaEmbeddings

    headers = {"Authorization": f"Bearer {at.key}"}
    return both(
        OllamaEmbeddings(model=at.model, base_url=at.url, client_kwargs={"headers": headers})
    )


def voyage(at: At) -> Ways:
    """It loads a tokenizer from the hub first."""
    from langchain_voyageai import VoyageAIEmbeddings

    return both(VoyageAIEmbeddings(model=at.model, base_url=at.v1, api_key=at.key, batch_size=8))


def hugging_face(at: At) -> Ways:
    from langchain_huggingface import HuggingFaceEndpointEmbeddings

    return both(HuggingFaceEndpointEmbeddings(model=at.url, huggingfacehub_api_token=at.key))


def nvidia_rerank(at: At) -> Ranks:
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    return of_compressor(NVIDIARerank(model=at.model, base_url=at.v1, api_key=at.key))


def cohere_rerank(at: At) -> Ranks:
    from langchain_cohere import CohereRerank

    return of_compressor(
        CohereRerank(model=at.model, base_url=at.url, cohere_api_key=at.key, top_n=None)
    )


def of_compressor(compressor: Any) -> Ranks:
    from langchain_core.documents import Document

    def scores(query: str, texts: list[str]) -> list[float]:
        documents = [Document(text, metadata={"at": at}) for at, text in enumerate(texts)]
        found = compressor.compress_documents(documents, query)
        return in_order([document.metadata for document in found], "at", "relevance_score")

    return Ranks(scores)
