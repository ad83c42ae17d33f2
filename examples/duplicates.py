"""Rows of a CSV file that say the same in other words: duplicates.py FILE COLUMN [COSINE]"""

import csv
import os
import sys

import numpy as np
from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)


def embed(texts: list[str]) -> np.ndarray:
    """float32 [N, D]. Texts are compared with texts here: all get the same task."""
    rows: list[list[float]] = []
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        answer = client.embeddings.create(
            model="nv-embed-small", input=part, extra_body={"task": "STS"}
        )
        rows += [item.embedding for item in answer.data]
    return np.array(rows, dtype=np.float32)


file, column = sys.argv[1:3]
least = float(sys.argv[3]) if len(sys.argv) > 3 else 0.75  # it depends on the model
with open(file, encoding="utf-8", newline="") as lines:
    texts = [row[column] for row in csv.DictReader(lines)]
vectors = embed(texts)
pairs = []
for first, vector in enumerate(vectors):  # a row at a time: N x N numbers may not fit
    scores = vectors[first + 1 :] @ vector
    pairs += [(scores[i], first, first + 1 + i) for i in np.flatnonzero(scores >= least)]
for score, first, second in sorted(pairs, reverse=True):
    print(f"{score:.3f}  row {first + 1}: {texts[first]} | row {second + 1}: {texts[second]}")
