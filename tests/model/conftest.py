from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.encoder import Encoder
from model.tokenizer import NVEmbedTokenizer

torch.set_num_threads(1)  # with models this small, threads wait for each other


@pytest.fixture(scope="session")
def tokenizer(golden_checkpoint: Path) -> NVEmbedTokenizer:
    return NVEmbedTokenizer.from_dir(golden_checkpoint)


@pytest.fixture(scope="session")
def golden_config(golden_checkpoint: Path) -> ModelConfig:
    return ModelConfig.from_dir(golden_checkpoint)


@pytest.fixture(scope="session")
def golden_encoder(golden_checkpoint: Path) -> Encoder:
    return Encoder(golden_checkpoint, device="cpu", dtype="float32")
