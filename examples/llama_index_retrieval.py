"""LlamaIndex: a retriever for a chat model, query and passages each embedded on its own side."""

import os
from typing import Any

from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode
from openai import OpenAI
from pydantic import PrivateAttr


class NVEmbed(BaseEmbedding):
    """LlamaIndex' own client of OpenAI sends queries as it sends passages; this one does not."""

    _client: OpenAI = PrivateAttr()

    def __init__(self, url: str, model: str, api_key: str = "none", **options: Any) -> None:
        super().__init__(model_name=model, **options)
        self._client = OpenAI(base_url=url, api_key=api_key)

    def _embed(self, texts: list[str], side: str) -> list[list[float]]:
        answer = self._client.embeddings.create(model=f"{self.model_name}-{side}", input=texts)
        return [item.embedding for item in answer.data]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query], "query")[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text], "passage")[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, "passage")


embedding = NVEmbed(
    os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    "nv-embed-small",
    os.environ.get("OPENAI_API_KEY", "none"),
)
texts = ["You can borrow books for four weeks.", "The canteen opens at noon.", "Dogs must be led."]
index = VectorStoreIndex([TextNode(text=text) for text in texts], embed_model=embedding)
retriever = index.as_retriever(similarity_top_k=1)
question = "when is lunch served?"
found = "\n".join(node.text for node in retriever.retrieve(question))
# The prompt for your chat model: llm.complete(prompt)
prompt = PromptTemplate("Answer from this: {passages}\nQuestion: {question}")
print(prompt.format(passages=found, question=question))
