"""Search a folder of text files by meaning: semantic_search.py FOLDER QUESTION

Vectors are kept in FOLDER/.vectors.npz; of another call only new paragraphs are embedded.
"""

import os
import sys
from pathlib import Path

import numpy as np
from openai import OpenAI

TEXTS_PER_REQUEST = 256
client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)


def embed(texts: list[str], side: str) -> tuple[np.ndarray, str]:
    """float32 [N, D], rows of length 1, and which vectors they are. `side`: query or passage."""
    rows: list[list[float]] = []
    fingerprint = ""
    for start in range(0, len(texts), TEXTS_PER_REQUEST):
        part = texts[start : start + TEXTS_PER_REQUEST]
        raw = client.embeddings.with_raw_response.create(model=f"nv-embed-small-{side}", input=part)
        fingerprint = raw.headers["x-nv-embed-fingerprint"]
        rows += [item.embedding for item in raw.parse().data]
    return np.array(rows, dtype=np.float32), fingerprint


def paragraphs(folder: Path) -> list[tuple[str, str]]:
    """(file, paragraph) of all text files, a blank line between paragraphs."""
    return [
        (str(file.relative_to(folder)), " ".join(part.split()))
        for file in sorted(folder.rglob("*.txt"))
        for part in file.read_text(encoding="utf-8").split("\n\n")
        if part.strip()
    ]


folder, question = Path(sys.argv[1]), sys.argv[2]
found = paragraphs(folder)
if not found:
    sys.exit(f"{folder} holds no .txt file with text")
(query,), fingerprint = embed([question], "query")
index, known = folder / ".vectors.npz", {}
if index.exists():
    kept = np.load(index)
    if kept["fingerprint"] == fingerprint:  # another model's vectors cannot be compared
        known = dict(zip(kept["texts"].tolist(), kept["vectors"], strict=True))
new = list(dict.fromkeys(text for _, text in found if text not in known))
known |= dict(zip(new, embed(new, "passage")[0], strict=True))
vectors = np.stack([known[text] for _, text in found])
np.savez(index, texts=[text for _, text in found], vectors=vectors, fingerprint=fingerprint)
print(f"{len(new)} of {len(found)} paragraphs embedded", file=sys.stderr)
scores = vectors @ query
for place in np.argsort(-scores)[:3]:
    print(f"{scores[place]:.3f}  {found[place][0]}: {found[place][1]}")
