"""The projection that a checkpoint was distilled to, found again from its own vectors.

    python -m model.training.align CHECKPOINT OUT --texts texts.jsonl --vectors DIR

Distillation can go on only towards the same axes, and a second fit has others: principal axes with
nearly the same variance turn among one another with the smallest change of texts. So the
teacher's principal axes are turned until the projected vectors are nearest to the checkpoint's
(orthogonal Procrustes, Schönemann 1966). CHECKPOINT may be nv-embed-small, the shipped one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model import console
from model.hub import packaged_checkpoint
from model.training.examples import DataError, read_texts
from model.training.teacher import Projection, load_vectors

MEASURED = 1000
"""Texts, the last ones, that show how near the result comes and are not fitted to."""


def aligned(teacher: NDArray[np.floating], learner: NDArray[np.float32]) -> Projection:
    """teacher [N, W], learner [N, D], of the same texts."""
    rows = teacher.astype(np.float32)
    axes = Projection.fit(rows, learner.shape[1]).matrix
    left, _, right = np.linalg.svd(axes.T @ (rows.T.astype(np.float64) @ learner))
    return Projection(np.ascontiguousarray(axes @ (left @ right), dtype=np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description="Find a checkpoint's projection again.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="projection.safetensors")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--vectors", type=Path, required=True, help="the teacher's, of the texts")
    parser.add_argument("--last-text", type=int, default=50_000, help="use so many (%(default)s)")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    from model.encoder import Encoder

    teacher = load_vectors(arguments.vectors)[: arguments.last_text]
    texts = read_texts(arguments.texts)[: len(teacher)]
    if len(texts) < 2 * MEASURED:
        raise DataError(f"{arguments.texts} and its vectors have fewer than {2 * MEASURED} texts")
    shipped = packaged_checkpoint()
    named = arguments.checkpoint
    folder = shipped if str(named) == shipped.name and not named.exists() else named
    learner = Encoder(str(folder), threads=arguments.threads).encode(texts, "")
    projection = aligned(teacher[:-MEASURED], learner[:-MEASURED])
    projection.save(arguments.out)
    cosines = (projection(teacher[-MEASURED:]) * learner[-MEASURED:]).sum(axis=1)
    print(f"mean cosine of {MEASURED} other texts: {cosines.mean():.4f}")


if __name__ == "__main__":
    sys.exit(console.run("align", main))
