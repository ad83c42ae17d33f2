"""Group the lines of a text file by meaning, with a plot: clusters.py FILE GROUPS PICTURE.png"""

import os
import sys
from pathlib import Path

import matplotlib
import numpy as np
from openai import OpenAI
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

matplotlib.use("agg")
from matplotlib import pyplot as plt

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)


def embed(texts: list[str]) -> np.ndarray:
    """float32 [N, D]. What to group by is an instruction: try another one."""
    rows: list[list[float]] = []
    for start in range(0, len(texts), 256):
        answer = client.embeddings.create(
            model="nv-embed-small",
            input=texts[start : start + 256],
            extra_body={"instruction": "Identify categories in user passages."},
        )
        rows += [item.embedding for item in answer.data]
    return np.array(rows, dtype=np.float32)


file, groups, picture = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
vectors = embed(texts)
labels = KMeans(groups, n_init=10, random_state=0).fit_predict(vectors)
for group in range(groups):
    print(f"group {group + 1}")
    for text, label in zip(texts, labels, strict=True):
        if label == group:
            print(f"  {text}")

points = PCA(2).fit_transform(vectors)
figure, axes = plt.subplots(figsize=(8, 6))
axes.scatter(*points.T, c=labels, cmap="tab10")
for text, point in zip(texts, points, strict=True):
    axes.annotate(text[:30], point, xytext=(5, 3), textcoords="offset points", fontsize=7)
axes.set(xticks=[], yticks=[], title=f"{len(texts)} lines in {groups} groups")
figure.savefig(picture, dpi=150, bbox_inches="tight")
