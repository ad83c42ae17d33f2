"""Parity with the authors' code: tests/golden/README.md says where the values come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from model.encoder import Encoder
from model.tokenizer import NVEmbedTokenizer, Truncation
from tests.checkpoints import golden_cases

CASES = pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])


@CASES
def test_same_token_ids_and_pool(case: dict[str, Any], tokenizer: NVEmbedTokenizer) -> None:
    for text, ids in zip(case["texts"], case["token_ids"], strict=True):
        encoding = tokenizer.encode(
            text, case["instruction"], max_tokens=case["max_length"], truncate=Truncation.END
        )
        assert encoding.ids.tolist() == ids
        assert encoding.pool_start == case["instruction_lens"]


@CASES
def test_same_vectors(case: dict[str, Any], golden_encoder: Encoder) -> None:
    vectors = golden_encoder.encode(
        case["texts"],
        case["instruction"],
        max_tokens=case["max_length"],
        truncate=Truncation.END,
    )
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, np.array(case["embeddings"]), rtol=0, atol=1e-5)


def test_the_cases_are_all_there() -> None:
    assert len(golden_cases()) == 7
    assert sum(len(case["texts"]) for case in golden_cases()) == 18
