"""What one step learns from, and its losses: contrastive, soft labels, scores, distillation.

Knows no optimizer and no tokenizer. Shapes: N texts of a step in `Draw.in_order`, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.families import Family
from model.prompts import Prompt
from model.training.corpus import Corpus
from model.training.examples import Example, ScoredPair
from model.training.losses import (
    contrastive_loss,
    distillation_loss,
    nested,
    ranking_loss,
    soft_label_loss,
)
from model.training.settings import TrainingSettings

Prompted = tuple[str, str | Prompt]
"""A text, and what stands around it."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one step learns from."""

    examples: list[Example]
    negatives: list[str]
    owners: list[int]  # whose negative each one is
    texts: list[str]  # for distillation alone
    tasks: list[str]  # as whose query each of them is read; "": as a passage
    scored: list[ScoredPair]

    @property
    def in_order(self) -> list[str]:
        """Queries, positives, hard negatives, texts, the scored pairs' first and second texts."""
        queries = [e.query for e in self.examples]
        scored = [*(pair.first for pair in self.scored), *(pair.second for pair in self.scored)]
        positives = [e.positive for e in self.examples]
        return [*queries, *positives, *self.negatives, *self.texts, *scored]

    def prompted(self, family: Family) -> list[Prompted]:
        """The same as the family asks them."""
        around = [query_prompt(family, e) for e in self.examples]
        passages = [passage_prompt(family, e) for e in self.examples]
        around += [*passages, *(passages[owner] for owner in self.owners)]
        around += [
            family.prompt("query", task) if task else family.prompt("passage")
            for task in self.tasks
        ]
        around += [family.prompt("query", pair.task) for pair in self.scored] * 2
        return list(zip(self.in_order, around, strict=True))


def query_prompt(family: Family, example: Example) -> Prompt:
    """Raises PromptError where the family has no place for the example's task."""
    return family.prompt("query", example.task)


def passage_prompt(family: Family, example: Example) -> Prompt:
    """Around its positive and its negatives."""
    return family.prompt(*example.passage_asked)


class Objective:
    """The losses that the settings ask for."""

    def __init__(self, settings: TrainingSettings, corpus: Corpus, device: torch.device) -> None:
        self._settings, self._corpus, self._device = settings, corpus, device
        self._widths = settings.matryoshka_dimensions or ()

    def weight(self, loss: str) -> float:
        """What the loss counts in the sum."""
        s = self._settings
        return {
            "contrastive": s.contrastive_weight,
            "soft_labels": s.soft_label_weight,
            "scores": s.scored_weight,
            "distillation": s.distillation_weight,
            "words": s.word_weight,
        }[loss]

    def losses(self, draw: Draw, vectors: Tensor) -> dict[str, Tensor]:
        """The losses, unweighted, of the vectors [N, D] of draw.in_order."""
        s, count = self._settings, len(draw.examples)
        losses: dict[str, Tensor] = {}
        # Not only the drawn texts: whatever else in the batch has a teacher's vector, too.
        taught = self._taught(draw.in_order, vectors.shape[1])
        known = taught.isfinite().all(dim=1)
        if count:
            losses["contrastive"] = self._contrastive(draw, vectors, taught)
            queries, others = known[:count], known[count : 2 * count + len(draw.negatives)]
            if s.soft_label_weight and queries.any() and others.sum() > 1:
                found = (vectors[:count][queries], vectors[count : count + len(others)][others])
                wanted = (taught[:count][queries], taught[count : count + len(others)][others])
                loss = partial(soft_label_loss, temperature=s.temperature)
                losses["soft_labels"] = nested(loss, self._widths, *found, *wanted)
        if draw.scored:
            losses["scores"] = self._scores(draw.scored, vectors)
        if known.any():
            losses["distillation"] = nested(
                distillation_loss, self._widths, vectors[known], taught[known]
            )
        assert losses, "a step without a loss"
        return losses

    def _taught(self, texts: list[str], width: int) -> Tensor:
        """The teacher's vectors [N, D] of the texts, NaN of those that it was not shown."""
        rows = np.full((len(texts), width), np.nan, dtype=np.float32)
        for place, text in enumerate(texts):
            row = self._corpus.places.get(text)
            if row is not None:
                rows[place] = self._corpus.targets[row]
        return torch.from_numpy(rows).to(self._device)

    def _scores(self, scored: list[ScoredPair], vectors: Tensor) -> Tensor:
        order = sorted({pair.score for pair in scored})  # float32 would make near ones equal
        ranks = [order.index(pair.score) for pair in scored]
        scores = torch.tensor(ranks, device=self._device)
        loss = partial(ranking_loss, scores=scores, temperature=self._settings.temperature)
        return nested(loss, self._widths, *vectors[-2 * len(scored) :].chunk(2))

    def _contrastive(self, draw: Draw, vectors: Tensor, taught: Tensor) -> Tensor:
        s, count = self._settings, len(draw.examples)
        positives = [e.positive for e in draw.examples]
        same, same_negatives = (
            torch.tensor([[a == b for b in texts] for a in positives], dtype=torch.bool)
            .view(count, len(texts))
            .to(self._device)
            for texts in (positives, draw.negatives)
        )
        owners = torch.tensor(draw.owners, dtype=torch.long, device=self._device)
        sizes = [count, count, len(draw.negatives)]
        if s.false_negatives is not None:
            # NaN, of what the teacher does not know, is above nothing.
            queries, right, wrong = torch.split(taught[: sum(sizes)], sizes)
            most = s.false_negatives * (queries * right).sum(-1, keepdim=True)
            same = same | (queries @ right.T > most)
            of_others = owners != torch.arange(count, device=self._device)[:, None]
            same_negatives = same_negatives | (queries @ wrong.T > most) & of_others
        loss = partial(
            contrastive_loss,
            owners=owners,
            temperature=s.temperature,
            in_batch=s.in_batch_negatives,
            same=same,
            same_negatives=same_negatives,
        )
        return nested(loss, self._widths, *torch.split(vectors[: sum(sizes)], sizes))
