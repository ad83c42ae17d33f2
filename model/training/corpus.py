"""What a run learns from and is measured on, read from the files that its settings name.

Which rows a step sees is a function of the settings and the step's number alone. Knows no model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.training.examples import (
    HELD_OUT,
    DataError,
    Example,
    ScoredPair,
    is_held_out,
    read_examples,
    read_scored,
    read_texts,
)
from model.training.settings import TrainingSettings
from model.training.teacher import Projection, load_vectors

logger = logging.getLogger("nv_embed.training")


class Shuffle:
    """Numbers 0 … count-1 in a new order every epoch; `draw` gives any step's share of them."""

    def __init__(self, count: int, seed: int, stream: int) -> None:
        assert count > 0
        self.count, self.seed, self.stream = count, seed, stream
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def draw(self, step: int, size: int) -> list[int]:
        """The rows of `step`, which sees `size` of them; may cross into the next epoch."""
        return [self._at(step * size + offset) for offset in range(size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, self.stream, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.count)
        return int(self._order[place])


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run learns from, and what it is measured on."""

    examples: list[Example]
    held_out: list[Example]
    scored: list[ScoredPair]
    held_out_scored: list[ScoredPair]
    texts: list[str]
    targets: NDArray[np.float32]  # [len(texts), D], the teacher's vectors, projected
    drawn: list[int]  # rows of texts from which a step's texts are drawn
    held_out_texts: list[int]  # rows of texts that are measured instead
    places: dict[str, int]  # text -> its row


def load_corpus(settings: TrainingSettings) -> Corpus:
    """Read all data; held-out texts go to validation and nowhere else. Raises DataError."""
    rng = np.random.default_rng([settings.seed, 99])
    examples: list[Example] = []
    held_out: list[Example] = []
    for name, weight in settings.data.items():
        rows = read_examples(Path(name))
        if not rows:
            raise DataError(f"{name} holds no examples")
        if not settings.in_batch_negatives:
            _refuse_without_negatives(rows, name)
        share = settings.validation_rows // len(settings.data)
        held_out += [row for row in rows if is_held_out(row.query)][:share]
        kept = [trained for row in rows if (trained := without_held_out(row))]
        if not settings.in_batch_negatives:
            kept = [row for row in kept if row.negatives]
        whole, part = divmod(weight, 1)
        order = rng.permutation(len(kept))
        if kept and weight * len(kept) < 0.5:
            logger.warning("%s: a weight of %g takes none of %d examples", name, weight, len(kept))
        seen = [*np.tile(order, int(whole)), *order[: round(part * len(order))]]
        examples += [kept[i] for i in seen]
    if settings.data and not examples:
        raise DataError(f"{', '.join(settings.data)}: no example to train on")
    _warn_of_little(settings, examples, held_out)
    scored = read_scored(Path(settings.scored)) if settings.scored else []
    held_out_scored = [p for p in scored if is_held_out(p.first) or is_held_out(p.second)]
    scored = [p for p in scored if not (is_held_out(p.first) or is_held_out(p.second))]
    if settings.scored and len({pair.score for pair in scored}) < 2:
        raise DataError(f"{settings.scored}: no two pairs of different scores to train on")
    texts: list[str] = []
    targets = np.empty((0, 0), dtype=np.float32)
    if settings.texts:
        assert settings.vectors is not None
        texts = read_texts(Path(settings.texts))
        vectors = load_vectors(Path(settings.vectors))
        count = min(len(texts), len(vectors))
        if settings.last_text and count < settings.last_text:
            raise DataError(f"{settings.vectors} holds {count} vectors of {settings.last_text}")
        texts = texts[:count]
        if settings.projection:
            targets = Projection.load(Path(settings.projection))(vectors[:count])
        else:
            targets = vectors[:count].astype(np.float32)
            targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    span = range(settings.first_text, settings.last_text or len(texts))
    if settings.texts_per_step and not span:
        raise DataError(
            f"first_text is {settings.first_text}, and {settings.texts} with its vectors has "
            f"{len(texts)} texts"
        )
    measured = [row for row in span if is_held_out(texts[row])][: settings.validation_rows]
    drawn = [row for row in span if not is_held_out(texts[row])]
    places = {text: row for row, text in enumerate(texts)}
    return Corpus(
        examples,
        held_out,
        scored,
        held_out_scored[: settings.validation_rows],
        texts,
        targets,
        drawn,
        measured,
        places,
    )


def _warn_of_little(
    settings: TrainingSettings, examples: list[Example], held_out: list[Example]
) -> None:
    """A run on a handful of examples ends as well as any other, and has learnt nothing."""
    if not settings.data:
        return
    positives = {example.positive for example in examples}
    hard = {text for e in examples for text in e.negatives if settings.max_negatives} - positives
    if settings.in_batch_negatives and len(positives) == 1 and not hard:
        logger.warning(
            "there are no negatives: the %d example(s) have one positive and no hard negatives, so "
            "the contrastive loss is 0 and nothing is learnt from them",
            len(examples),
        )
    elif settings.in_batch_negatives and len(positives) < settings.pairs_per_step:
        logger.warning(
            "a step draws %d examples, and the data have %d different positives: in-batch "
            "negatives are few, and examples come several times in a step",
            settings.pairs_per_step,
            len(positives),
        )
    if settings.validation_rows and not held_out:
        logger.warning(
            "no example is held out (one in %d is, by its hash): the run measures none", HELD_OUT
        )


def without_held_out(example: Example) -> Example | None:
    """The example as it may be trained on: no text of it is held out; None when it may not."""
    if is_held_out(example.query) or is_held_out(example.positive):
        return None
    kept = tuple(text for text in example.negatives if not is_held_out(text))
    return replace(example, negatives=kept)


def _refuse_without_negatives(rows: list[Example], name: str) -> None:
    """Stage 2 compares a query with its own negatives alone: without any its loss is zero."""
    for line, example in enumerate(rows, 1):
        if not example.negatives:
            raise DataError(
                f"{name}, line {line}: no negatives, and stage 2 learns from hard negatives "
                "alone; `nv-embed mine` finds some"
            )
