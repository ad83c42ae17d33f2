"""The float32 referee, layer by layer, against the authors' own vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.tokenizer import NVEmbedTokenizer, Truncation
from model.verify.referee import Referee
from model.weights.checkpoint import Checkpoint
from tests.checkpoints import golden_cases


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_gives_the_authors_vectors(
    case: dict[str, object],
    golden_checkpoint: Path,
    golden_config: ModelConfig,
    tokenizer: NVEmbedTokenizer,
) -> None:
    encodings = [
        tokenizer.encode(
            text,
            case["instruction"],  # type: ignore[arg-type]
            max_tokens=case["max_length"],  # type: ignore[arg-type]
            truncate=Truncation.END,
        )
        for text in case["texts"]  # type: ignore[attr-defined]
    ]
    referee = Referee(golden_checkpoint, golden_config, torch.device("cpu"))
    got = referee.embed(encodings)
    assert np.abs(got - np.array(case["embeddings"])).max() < 1e-5


def test_reads_the_checkpoint_once_for_the_same_inputs(
    golden_checkpoint: Path,
    golden_config: ModelConfig,
    tokenizer: NVEmbedTokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    referee = Referee(golden_checkpoint, golden_config, torch.device("cpu"))
    one, two = (tokenizer.encode(text, max_tokens=64) for text in ("one", "another"))
    first = referee.embed([one, two, one])
    assert np.array_equal(first[0], first[2])
    monkeypatch.setattr(Checkpoint, "rows", None)
    assert np.array_equal(referee.embed([two, one]), first[[1, 0]])
