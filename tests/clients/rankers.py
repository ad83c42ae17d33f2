"""The rows of those that ask for scores."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import CUTS, Client


def rankers() -> Iterator[Client]:
    """By its package, module and adapter; what it shows of a text that is too long differs."""
    rows = [
        ("cohere ClientV2 rerank", "cohere", "sdks", "cohere_rerank", ""),
        ("infinity-client rerank", "infinity-client", "sdks", "infinity_rerank", ""),
        ("voyageai rerank", "voyageai", "sdks", "voyage_rerank", ""),
        (
            "langchain NVIDIARerank",
            "langchain-nvidia-ai-endpoints",
            "langchain",
            "nvidia_rerank",
            "",
        ),
        ("langchain-cohere CohereRerank", "langchain-cohere", "langchain", "cohere_rerank", ""),
        *(
            (f"litellm {prefix}/ rerank", "litellm", "litellm", "rerank", prefix)
            for prefix in ("cohere", "jina_ai", "hosted_vllm", "voyage")
        ),
        ("cohere-ai rerank (JS)", "cohere-ai", "node", "cohereRerank", ""),
    ]
    for row in rows:
        yield Client(*row, side="-", told=CUTS, ranks=True)
    yield Client(
        "baseten-performance-client rerank",
        "baseten-performance-client",
        "sdks",
        "baseten_rerank",
        side="-",
        ranks=True,
    )
    yield Client(
        "tei-client rerank",
        "tei-client",
        "sdks",
        "tei_rerank",
        ranks=True,
        refused="ModelType.Reranker model required",
        note="asks `/info` first whether this is a cross-encoder, and it is not",
    )
    yield Client(
        "litellm infinity/ rerank",
        "litellm",
        "litellm",
        "rerank",
        "infinity",
        ranks=True,
        refused="Input should be a valid string",
        note="wants each document as a bare string; here it is Jina's and vLLM's object",
    )
