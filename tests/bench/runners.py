"""Runners that compute nothing, for the benchmarks of everything around the model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.batch import Encoding, RunnerInfo, RunnerOptions
from model.config import ModelConfig

WIDTH = 4096


class Null:
    """The same random unit vector for every input: its digits are as many as real ones have."""

    def __init__(self, options: RunnerOptions) -> None:
        self.info = RunnerInfo(options.device, "null", "float32", "none", "none", WIDTH)
        row = np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
        self._rows = np.tile(row / np.linalg.norm(row), (options.max_batch_seqs, 1))

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        return self._rows[: len(encodings)]

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


class Paced:
    """A device of a known speed: it sleeps for a batch and for each token of it, by PACED_BATCH_S
    and PACED_TOKEN_S of the environment. All vectors are the same one, as wide as the checkpoint's
    config says."""

    def __init__(self, options: RunnerOptions) -> None:
        width = ModelConfig.from_dir(Path(options.path)).hidden_size
        self.info = RunnerInfo(options.device, "paced", "float32", "none", "none", width)
        self._row = np.full(width, width**-0.5, dtype=np.float32)
        self._batch_s = float(os.environ["PACED_BATCH_S"])
        self._token_s = float(os.environ["PACED_TOKEN_S"])

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        time.sleep(self._batch_s + self._token_s * sum(map(len, encodings)))
        return np.tile(self._row, (len(encodings), 1))

    def warm_up(self) -> None: ...

    def close(self) -> None: ...
