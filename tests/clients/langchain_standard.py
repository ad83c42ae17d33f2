"""langchain-tests' own suite for embeddings, over the classes that reach this server.

It runs in the clients' environment (`tests/clients/suites.py`), not with the project's own tests.
"""

from __future__ import annotations

import os
from typing import Any

from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests

SHARED = {
    "model": os.environ["CLIENTS_MODEL"],
    "base_url": os.environ["CLIENTS_URL"] + "/v1",
    "api_key": os.environ["CLIENTS_KEY"],
}


class TestNVIDIA(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[NVIDIAEmbeddings]:
        return NVIDIAEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return SHARED


class TestOpenAI(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {**SHARED, "check_embedding_ctx_length": False}


class TestDefaults(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return SHARED
