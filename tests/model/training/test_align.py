"""A lost projection is found again from the learner's own vectors."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from model.encoder import Encoder
from model.training import align
from model.training.teacher import Projection
from tests.model.training.conftest import WORDS


def teachers(count: int, width: int, rng: np.random.Generator) -> np.ndarray:
    rows = rng.normal(size=(count, width)) * np.linspace(1.2, 0.8, width)
    rows[:, 12:] *= 0.2
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_turned_projection_is_found_through_noise() -> None:
    rng = np.random.default_rng(3)
    teacher = teachers(4000, 20, rng)
    turn, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    lost = Projection((Projection.fit(teacher, 12).matrix @ turn).astype(np.float32))
    noise = rng.normal(size=(4000, 12)) * 0.15
    learner = lost(teacher) + noise
    learner = (learner / np.linalg.norm(learner, axis=1, keepdims=True)).astype(np.float32)
    found = align.aligned(teacher, learner)
    assert (found(teacher) * lost(teacher)).sum(axis=1).min() > 0.999
    # A second fit is of no use: its axes are others.
    assert (Projection.fit(teacher, 12)(teacher) * lost(teacher)).sum(axis=1).mean() < 0.5


def test_the_command(
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The tiny model's own vectors, padded and turned, are a teacher that it equals."""
    rng = np.random.default_rng(4)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(400)]
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{t}"}}\n' for t in texts))
    learner = Encoder(str(tiny_checkpoint), threads=1).encode(texts, "")
    turn, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    (tmp_path / "vectors").mkdir()
    teacher = np.pad(learner, ((0, 0), (0, 8))) @ turn
    np.save(tmp_path / "vectors" / "00000.npy", teacher.astype(np.float16))
    monkeypatch.setattr(align, "MEASURED", 50)
    out = tmp_path / "projection.safetensors"
    call = ["align", str(tiny_checkpoint), str(out), "--texts", str(tmp_path / "texts.jsonl")]
    call += ["--vectors", str(tmp_path / "vectors"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", call)
    align.main()
    assert "mean cosine of 50 other texts: 1.0000" in capsys.readouterr().out
    assert (Projection.load(out)(teacher) * learner).sum(axis=1).min() > 0.999
    monkeypatch.setattr(align, "MEASURED", 201)
    with pytest.raises(Exception, match="fewer than 402 texts"):
        align.main()
