"""Find the passage that answers a question, with OpenAI's own client."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),  # a server without keys takes any
)
model = next(m.id for m in client.models.list() if not m.id.endswith(("-query", "-passage")))


def embed(texts: list[str], input_type: str) -> list[list[float]]:
    """One vector of length 1 for each text. `input_type` is a field of this server."""
    answer = client.embeddings.create(
        model=model, input=texts, extra_body={"input_type": input_type}
    )
    return [item.embedding for item in answer.data]


passages = [
    "You can borrow books for four weeks.",
    "The canteen opens at noon.",
    "Dogs must be led.",
]
(question,) = embed(["when is lunch served?"], "query")
# The vectors have length 1, so that their product is the cosine: 1 is the same direction.
scores = [
    sum(a * b for a, b in zip(question, passage, strict=True))
    for passage in embed(passages, "passage")
]
print(passages[scores.index(max(scores))])
