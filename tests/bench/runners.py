"""A runner that computes nothing, for the benchmark of everything around the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.batch import Encoding, RunnerInfo, RunnerOptions

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
