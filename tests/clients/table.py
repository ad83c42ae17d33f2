"""Which clients are tried, and what each is expected to show: the one table to edit."""

from __future__ import annotations

from collections.abc import Iterator

from tests.clients.client import CUTS, NO_KEY, NO_MODEL, Client
from tests.clients.rankers import rankers


def sdks() -> Iterator[Client]:
    def row(name: str, package: str, adapter: str, **rest: object) -> Client:
        return Client(name, package, "sdks", adapter, **rest)  # type: ignore[arg-type]

    yield row("openai", "openai", "openai_sync")
    yield row("openai, async", "openai", "openai_async")
    yield row("openai, extra_body input_type", "openai", "openai_input_type", side="Q")
    yield row("openai AzureOpenAI", "openai", "openai_azure")
    yield row("requests", "requests", "by_requests")
    yield row("aiohttp", "aiohttp", "by_aiohttp")
    yield row("curl", "curl", "by_curl")
    yield row("cohere ClientV2", "cohere", "cohere_v2", side="Q", told=CUTS)
    yield row("cohere Client", "cohere", "cohere_v1", side="Q", told=CUTS)
    yield row("voyageai", "voyageai", "voyage", side="Q")
    yield row(
        "huggingface_hub InferenceClient",
        "huggingface_hub",
        "hugging_face",
        side="u",
        told=NO_MODEL,
    )
    yield row("ollama embed", "ollama", "ollama_embed", told=CUTS)
    yield row("ollama embeddings", "ollama", "ollama_embeddings", told=CUTS)
    yield row("infinity-client", "infinity-client", "infinity")
    yield row(
        "tei-client",
        "tei-client",
        "tei",
        side="u",
        told=(),
        note="it reads `/info` first, and takes an error for an answer",
    )
    yield row("baseten-performance-client", "baseten-performance-client", "baseten")
    yield row("llm", "llm", "llm")
    yield row("pydantic-ai Embedder", "pydantic-ai-slim", "pydantic_ai", silent=True)
    yield row(
        "agno",
        "agno",
        "agno",
        refused="This model has 256 dimensions, 1536 cannot be had",
        note="asks for 1,536 dimensions by default: set `dimensions`",
    )
    yield row("agno, dimensions=", "agno", "agno", argument="256")
    yield row("chromadb OpenAI", "chromadb", "chroma", silent=True)
    yield row(
        "chromadb HuggingFaceServer",
        "chromadb",
        "chroma_hugging_face",
        side="u",
        told=(),
        note="an error of the server reads `could not convert string to float: 'error'`",
    )
    yield row(
        "chromadb Ollama",
        "chromadb",
        "chroma_ollama",
        server="open",
        told=("model",),
        note="it cannot send a key",
    )
    yield row(
        "lancedb openai, dim=",
        "lancedb",
        "lancedb",
        silent=True,
        told=("model", "key"),
        note="it logs a 400, goes on, and fails at `'NoneType' object is not iterable`",
    )


def langchain() -> Iterator[Client]:
    def row(name: str, package: str, adapter: str, **rest: object) -> Client:
        return Client(name, package, "langchain", adapter, **rest)  # type: ignore[arg-type]

    yield row(
        "langchain-openai, check_embedding_ctx_length=False",
        "langchain-openai",
        "openai",
        silent=True,
    )
    yield row(
        "langchain-openai",
        "langchain-openai",
        "openai",
        argument="defaults",
        refused="check_embedding_ctx_length=False",
        note="sends another tokenizer's ids by default",
    )
    yield row(
        "langchain-openai, defaults, cl100k decoded",
        "langchain-openai",
        "openai",
        argument="defaults",
        server="cl100k",
        silent=True,
    )
    yield row("langchain-openai Azure", "langchain-openai", "azure", silent=True)
    yield row("langchain-nvidia-ai-endpoints", "langchain-nvidia-ai-endpoints", "nvidia", side="Q")
    community = "langchain-community"
    yield row(
        "langchain-community Infinity",
        community,
        "community_infinity",
        silent=True,
        told=NO_KEY,
        server="open",
        note="it cannot send a key",
    )
    yield row("langchain-community Voyage", community, "community_voyage", side="Q")
    yield row(
        "langchain-community LocalAI",
        community,
        "community_localai",
        refused="module 'openai' has no attribute",
        note="fails before it sends anything",
    )
    yield row(
        "langchain-community Llamafile",
        community,
        "community_llamafile",
        server="open",
        refused="404",
        note="asks `/embedding`, llama.cpp's own route",
    )
    yield row(
        "langchain-community OpenAI, cl100k decoded",
        community,
        "community_openai",
        silent=True,
        server="cl100k",
    )
    yield row("langchain-community Ollama", community, "community_ollama", silent=True, told=CUTS)
    yield row("langchain-cohere", "langchain-cohere", "cohere", side="Q", told=CUTS)
    yield row("langchain-ollama", "langchain-ollama", "ollama", silent=True, told=CUTS)
    yield row(
        "langchain-voyageai",
        "langchain-voyageai",
        "voyage",
        refused="offline",
        note="loads a tokenizer from the hub first, whatever it talks to; not tried further",
    )
    yield row(
        "langchain-huggingface HuggingFaceEndpointEmbeddings",
        "langchain-huggingface",
        "hugging_face",
        refused="URL",
        note="refuses every URL itself",
    )


def llama_index() -> Iterator[Client]:
    def row(kind: str, adapter: str, **rest: object) -> Client:
        package = f"llama-index-embeddings-{kind}"
        return Client(package, package, "llama_index", adapter, **rest)  # type: ignore[arg-type]

    yield row("openai", "openai", silent=True)
    yield Client(
        "llama-index-embeddings-openai, its default model",
        "llama-index-embeddings-openai",
        "llama_index",
        "openai",
        server="ada",
        silent=True,
        note="`--served-model-name text-embedding-ada-002`",
    )
    yield row("openai-like", "openai_like", silent=True)
    yield row("azure-openai", "azure", silent=True)
    yield row("nvidia", "nvidia", side="u", silent=True)
    yield row(
        "text-embeddings-inference",
        "tei",
        side="u",
        silent=True,
        told=(),
        note="our error is inside a pydantic ValidationError",
    )
    yield row(
        "cohere",
        "cohere",
        side="Q",
        told=("key",),
        server="cohere",
        note="has its own list of names: `--served-model-name embed-english-v3.0`",
    )
    yield row("ollama", "ollama", silent=True, told=CUTS)


def haystack() -> Iterator[Client]:
    def row(name: str, package: str, adapter: str, **rest: object) -> Client:
        return Client(name, package, "haystack", adapter, **rest)  # type: ignore[arg-type]

    yield row("haystack-ai OpenAI", "haystack-ai", "openai", silent=True)
    yield row("haystack-ai OpenAI, prefix=", "haystack-ai", "openai", argument="prefix", side="Q")
    yield row("nvidia-haystack", "nvidia-haystack", "nvidia", side="Q")
    yield row("cohere-haystack", "cohere-haystack", "cohere", side="Q", told=CUTS)
    yield row("ollama-haystack", "ollama-haystack", "ollama", silent=True, told=CUTS)


PREFIXES = """openai hosted_vllm infinity nvidia_nim litellm_proxy openai_like jina_ai voyage
xinference together_ai fireworks_ai mistral lm_studio llamafile"""


def litellm() -> Iterator[Client]:
    for prefix in PREFIXES.split():
        yield Client(f"litellm {prefix}/", "litellm", "litellm", "embedding", prefix, side="Q")

    def row(name: str, package: str, adapter: str, **rest: object) -> Client:
        return Client(name, package, "litellm", adapter, **rest)  # type: ignore[arg-type]

    yield row("litellm azure/", "litellm", "azure")
    yield row("litellm cohere/", "litellm", "cohere", side="Q", told=CUTS)
    yield row("litellm ollama/", "litellm", "embedding", argument="ollama", silent=True, told=CUTS)
    yield row("langchain-litellm", "langchain-litellm", "langchain", silent=True)
    name = "llama-index-embeddings-litellm"
    yield row(name, name, "llama_index", silent=True)
    yield row("dspy Embedder", "dspy", "dspy")
    yield Client("litellm proxy", "litellm", "proxy", "proxy")


def others() -> Iterator[Client]:
    yield Client("semantic-kernel", "semantic-kernel", "agents", "semantic_kernel")
    yield Client("mem0ai", "mem0ai", "agents", "mem0", silent=True)
    yield Client("graphiti-core", "graphiti-core", "agents", "graphiti", silent=True)
    yield Client("txtai, litellm", "txtai", "borrowed", "txtai", silent=True)
    yield Client("mteb OpenAIModel, embed_dim=", "mteb", "borrowed", "mteb", silent=True)


def javascript() -> Iterator[Client]:
    def row(name: str, package: str, adapter: str, **rest: object) -> Client:
        return Client(f"{name} (JS)", package, "node", adapter, **rest)  # type: ignore[arg-type]

    yield row("openai", "openai", "openai")
    yield row("openai AzureOpenAI", "openai", "azure")
    yield row("@langchain/openai", "@langchain/openai", "langchainOpenAI", silent=True)
    yield row("@langchain/cohere", "@langchain/cohere", "langchainCohere", side="Q", told=CUTS)
    yield row("@ai-sdk/openai-compatible", "@ai-sdk/openai-compatible", "aiCompatible")
    yield row("@ai-sdk/openai", "@ai-sdk/openai", "aiOpenAI")
    yield row("@llamaindex/openai", "@llamaindex/openai", "llamaIndexOpenAI", silent=True)
    yield row("voyageai", "voyageai", "voyage", side="Q")
    yield row("cohere-ai", "cohere-ai", "cohere", side="Q", told=CUTS)
    yield row(
        "@huggingface/inference",
        "@huggingface/inference",
        "huggingFace",
        side="u",
        told=NO_MODEL,
    )
    yield row("ollama", "ollama", "ollama", told=CUTS)


CLIENTS = [
    *sdks(),
    *langchain(),
    *llama_index(),
    *haystack(),
    *litellm(),
    *others(),
    *javascript(),
    *rankers(),
]
