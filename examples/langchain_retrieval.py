"""LangChain: a retriever for a chat model, query and passages each embedded on its own side."""

import os

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
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


def joined(documents: list[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


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
retriever = store.as_retriever(search_kwargs={"k": 1})
prompt = ChatPromptTemplate.from_template("Answer from this: {passages}\nQuestion: {question}")
chain = {"passages": retriever | joined, "question": RunnablePassthrough()} | prompt
# Behind it comes your chat model: chain | model | StrOutputParser()
print(chain.invoke("when is lunch served?").to_string())
