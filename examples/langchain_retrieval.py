"""LangChain: a question and passages, each embedded on its own side."""

import os

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings


class NVEmbed(Embeddings):
    """LangChain's client has one model for both sides; this one has a name for each."""

    def __init__(self, url: str, model: str, api_key: str = "none") -> None:
        def side(name: str) -> OpenAIEmbeddings:
            return OpenAIEmbeddings(
                model=f"{model}-{name}",
                base_url=url,
                api_key=api_key,
                # Otherwise it sends the ids of OpenAI's tokenizer, which this server refuses.
                check_embedding_ctx_length=False,
            )

        self.passages, self.queries = side("passage"), side("query")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.passages.embed_documents(texts)

    def embed_query(self, text: str) -> list[float]:
        return self.queries.embed_query(text)


store = InMemoryVectorStore(
    NVEmbed(
        os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        "nv-embed-small",
        os.environ.get("OPENAI_API_KEY", "none"),
    )
)
store.add_texts(
    ["You can borrow books for four weeks.", "The canteen opens at noon.", "Dogs must be led."]
)
print(store.similarity_search("when is lunch served?", k=1)[0].page_content)
