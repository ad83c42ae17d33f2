"""Haystack's embedders: one for documents, one for a question."""

from __future__ import annotations

import os
from typing import Any

from haystack import Document
from haystack.utils import Secret

from tests.clients.adapters.ways import At, Ways

TASK = "Given a question, retrieve passages that answer the question"


def ways(documents: Any, text: Any) -> Ways:
    for embedder in (documents, text):
        embedder.warm_up()

    def passages(texts: list[str]) -> list[Any]:
        found = documents.run([Document(content=text) for text in texts])["documents"]
        return [document.embedding for document in found]

    return Ways(passages, lambda question: text.run(question)["embedding"])


def openai(at: At) -> Ways:
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder

    shared = {"api_key": Secret.from_token(at.key), "model": at.model, "api_base_url": at.v1}
    prefix = f"Instruct: {TASK}\nQuery: " if at.argument == "prefix" else ""
    return ways(
        OpenAIDocumentEmbedder(**shared, raise_on_failure=True, progress_bar=False),
        OpenAITextEmbedder(**shared, prefix=prefix),
    )


def nvidia(at: At) -> Ways:
    from haystack_integrations.components.embedders.nvidia import (
        NvidiaDocumentEmbedder,
        NvidiaTextEmbedder,
    )

    shared = {"api_key": Secret.from_token(at.key), "model": at.model, "api_url": at.v1}
    return ways(NvidiaDocumentEmbedder(**shared, progress_bar=False), NvidiaTextEmbedder(**shared))


def cohere(at: At) -> Ways:
    from haystack_integrations.components.embedders.cohere import (
        CohereDocumentEmbedder,
        CohereTextEmbedder,
    )

    shared = {"api_key": Secret.from_token(at.key), "model": at.model, "api_base_url": at.url}
    return ways(CohereDocumentEmbedder(**shared, progress_bar=False), CohereTextEmbedder(**shared))


def ollama(at: At) -> Ways:
    from haystack_integrations.components.embedders.ollama import (
        OllamaDocumentEmbedder,
        OllamaTextEmbedder,
    )

    os.environ["OLLAMA_API_KEY"] = at.key
    shared = {"model": at.model, "url": at.url}
    return ways(OllamaDocumentEmbedder(**shared, progress_bar=False), OllamaTextEmbedder(**shared))
