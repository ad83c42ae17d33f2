from __future__ import annotations

from pathlib import Path

import pytest

from model.tokenizer import NVEmbedTokenizer


@pytest.fixture(scope="session")
def tokenizer(golden_checkpoint: Path) -> NVEmbedTokenizer:
    return NVEmbedTokenizer.from_dir(golden_checkpoint)
