"""Postgres with pgvector as the store; DATABASE_URL says where it is."""

import os

import numpy as np
import psycopg
from openai import OpenAI
from pgvector.psycopg import register_vector

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
FINGERPRINT = "x-nv-embed-fingerprint"


def embed(texts: list[str], side: str, like: str | None = None) -> tuple[list[np.ndarray], str]:
    """Vectors and their fingerprint. like: refuse (409) to make others than those of this one."""
    raw = client.embeddings.with_raw_response.create(
        model=f"nv-embed-small-{side}",
        input=texts,
        extra_headers={FINGERPRINT: like} if like else {},
    )
    return [np.array(item.embedding) for item in raw.parse().data], raw.headers[FINGERPRINT]


passages = [
    "You can borrow books for four weeks.",
    "The canteen opens at noon.",
    "Dogs must be led.",
]
with psycopg.connect(os.environ["DATABASE_URL"], autocommit=True) as database:
    database.execute("CREATE EXTENSION IF NOT EXISTS vector")
    register_vector(database)
    vectors, fingerprint = embed(passages, "passage")
    database.execute("DROP TABLE IF EXISTS passages")
    database.execute(
        f"CREATE TABLE passages (text text, fingerprint text, vector vector({len(vectors[0])}))"
    )
    with database.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO passages VALUES (%s, %s, %s)",
            [(text, fingerprint, row) for text, row in zip(passages, vectors, strict=True)],
        )
    # With many rows; up to 2,000 dimensions. For more: (vector::halfvec(4096)) halfvec_cosine_ops
    database.execute("CREATE INDEX ON passages USING hnsw (vector vector_cosine_ops)")

    (stored,) = database.execute("SELECT fingerprint FROM passages LIMIT 1").fetchone()
    (question,), _ = embed(["when is lunch served?"], "query", like=stored)
    for text, score in database.execute(
        "SELECT text, 1 - (vector <=> %s) FROM passages ORDER BY vector <=> %s LIMIT 3",
        (question, question),
    ):
        print(f"{score:.3f}  {text}")
