"""Search a folder of text files by meaning: semantic_search.py FOLDER QUESTION"""

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


def embed(texts: list[str], side: str) -> np.ndarray:
    """float32 [N, D], rows of length 1. `side` is query or passage."""
    rows: list[list[float]] = []
    for start in range(0, len(texts), TEXTS_PER_REQUEST):
        part = texts[start : start + TEXTS_PER_REQUEST]
        answer = client.embeddings.create(model=f"nv-embed-small-{side}", input=part)
        rows += [item.embedding for item in answer.data]
    return np.array(rows, dtype=np.float32)


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
# A real program keeps these vectors, and embeds only files that are new.
scores = embed([text for _, text in found], "passage") @ embed([question], "query")[0]
for place in np.argsort(-scores)[:3]:
    file, text = found[place]
    print(f"{scores[place]:.3f}  {file}: {text}")
