"""LanceDB as the store, in a folder: lancedb_store.py FOLDER"""

import os
import sys

import lancedb
from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
FINGERPRINT = "x-nv-embed-fingerprint"


def embed(texts: list[str], side: str, like: str | None = None) -> tuple[list[list[float]], str]:
    """Vectors and their fingerprint. like: refuse (409) to make others than those of this one."""
    raw = client.embeddings.with_raw_response.create(
        model=f"nv-embed-small-{side}",
        input=texts,
        extra_headers={FINGERPRINT: like} if like else {},
    )
    return [item.embedding for item in raw.parse().data], raw.headers[FINGERPRINT]


passages = [
    "You can borrow books for four weeks.",
    "The canteen opens at noon.",
    "Dogs must be led.",
]
vectors, fingerprint = embed(passages, "passage")
rows = [
    {"text": text, "fingerprint": fingerprint, "vector": vector}
    for text, vector in zip(passages, vectors, strict=True)
]
lancedb.connect(sys.argv[1]).create_table("passages", rows, mode="overwrite")

table = lancedb.connect(sys.argv[1]).open_table("passages")  # another program, another day
stored = table.search().limit(1).to_list()[0]["fingerprint"]
(question,), _ = embed(["when is lunch served?"], "query", like=stored)
for row in table.search(question).distance_type("cosine").limit(3).to_list():
    print(f"{1 - row['_distance']:.3f}  {row['text']}")
