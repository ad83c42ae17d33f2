"""The teacher fine-tuned on the examples that the small model learnt from: a fair comparison.

    python -m model.training.baseline stage2.jsonl -o OUT [--symmetric]

OUT is a sentence-transformers folder, for `nv-embed evaluate --teacher OUT`. The loss is stage 2's:
hard negatives alone, up to three. No instructions, since the teacher knows none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import console
from model.platform import resources
from model.training.corpus import without_held_out
from model.training.examples import Example, read_examples
from model.training.losses import contrastive_loss
from model.training.teacher import Teacher

_NEGATIVES = 3


def fine_tune(
    teacher: Teacher,
    examples: list[Example],
    *,
    steps: int,
    pairs_per_step: int = 32,
    learning_rate: float = 2e-5,
    temperature: float = 0.05,
    seed: int = 1,
) -> list[float]:
    """Train the teacher in place; returns the losses."""
    network = teacher.network.float().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    losses = []

    def embed(texts: list[str]) -> Tensor:
        features = network.preprocess(texts)
        with torch.autocast("cpu", torch.bfloat16, enabled=resources.has_bfloat16()):
            vectors = network(features)["sentence_embedding"]
        return F.normalize(vectors.float(), dim=-1)

    for step in tqdm(range(steps), "Fine-tuning"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / (0.1 * steps), 1 - step / steps)
        batch = [examples[i] for i in rng.choice(len(examples), pairs_per_step, replace=False)]
        hard = [
            (owner, text)
            for owner, example in enumerate(batch)
            for text in rng.permutation(example.negatives)[:_NEGATIVES].tolist()
        ]
        owners, negatives = zip(*hard, strict=True)
        texts = [e.query for e in batch] + [e.positive for e in batch] + list(negatives)
        rows = embed(texts)
        loss = contrastive_loss(
            rows[:pairs_per_step],
            rows[pairs_per_step : 2 * pairs_per_step],
            rows[2 * pairs_per_step :],
            torch.tensor(owners),
            temperature=temperature,
            in_batch=False,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    network.eval()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune the teacher, for comparison.")
    parser.add_argument("examples", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--teacher", help="folder of a sentence-transformers model")
    parser.add_argument("--symmetric", action="store_true", help="symmetric examples alone")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    rows = [row for e in read_examples(arguments.examples) if (row := without_held_out(e))]
    rows = [row for row in rows if row.negatives and (row.symmetric or not arguments.symmetric)]
    teacher = Teacher(arguments.teacher, dtype="float32")
    losses = fine_tune(teacher, rows, steps=arguments.steps)
    teacher.network.save(str(arguments.out))
    tenth = max(1, len(losses) // 10)
    print(f"loss {np.mean(losses[:tenth]):.3f} -> {np.mean(losses[-tenth:]):.3f}")


if __name__ == "__main__":
    sys.exit(console.run("baseline", main))
