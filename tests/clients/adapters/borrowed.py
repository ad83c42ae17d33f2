"""Clients that import torch: they run with the torch of the project's own environment."""

from __future__ import annotations

import time
from typing import Any

from tests.clients.adapters.ways import At, Ways


def txtai(at: At) -> Ways:
    from txtai.vectors import VectorsFactory

    config = {
        "method": "litellm",
        "path": f"openai/{at.model}",
        "vectors": {"api_base": at.v1, "api_key": at.key},
    }
    vectors = VectorsFactory.create(config, None)
    return Ways(
        lambda texts: vectors.encode(texts, "data"),
        lambda text: vectors.encode([text], "query")[0],
    )


def mteb(at: At) -> Ways:
    from mteb.models.model_implementations.openai_models import OpenAIModel
    from openai import OpenAI

    time.sleep = lambda seconds: None  # it waits for 70 s before it tells an error
    client = OpenAI(base_url=at.v1, api_key=at.key)
    model = OpenAIModel(at.model, 8191, embed_dim=256, client=client)

    def ask(texts: list[str], side: Any) -> Any:
        from mteb.types import PromptType

        batches = [{"text": texts}]
        return model.encode(
            batches,
            task_metadata=None,
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType(side),
        )

    return Ways(lambda texts: ask(texts, "document"), lambda text: ask([text], "query")[0])
