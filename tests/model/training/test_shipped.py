"""The model that ships: its size, its papers, and that its vectors mean something."""

from __future__ import annotations

import csv

import pytest

from model.encoder import Encoder
from model.hub import locate, packaged_checkpoint
from model.tokenizer import query_prefix
from tests.checkpoints import official_tokenizer


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(packaged_checkpoint(), device="cpu", dtype="float32", threads=1)


def test_its_papers() -> None:
    folder = packaged_checkpoint()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 32e6
    source = locate(str(folder))
    assert source.model_id == "nv-embed-small"
    assert source.license == "apache-2.0"
    assert "Apache License" in (folder / "LICENSE").read_text()
    with (folder / "SOURCES.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 10
    assert all(len(row["sha256"]) == 64 and row["licence"] for row in rows)


def test_its_tokenizer_is_the_official_one(encoder: Encoder) -> None:
    """But for runs of spaces within a text, which it joins sooner: it was trained so."""
    texts = ["Hello world\n", "naïve 漢字 🙂", "x" * 50, "</s> x"]
    shipped = [encoder.tokenizer.encode(text, max_tokens=200).ids.tolist() for text in texts]
    official = official_tokenizer()
    official.encode_special_tokens = True
    assert shipped == [[*official.encode(text).ids, 2] for text in texts]


def test_it_finds_what_is_asked_for(encoder: Encoder) -> None:
    prefix = query_prefix("Given a question, retrieve passages that answer the question")
    questions = [
        "how do plants make food from sunlight?",
        "why did my card payment fail?",
        "sorting a list of numbers in a program",
        "who treats sick animals?",
    ]
    passages = [
        "Photosynthesis turns light, water and carbon dioxide into sugar in green leaves.",
        "A transaction is declined when the bank account has too little money on it.",
        "Quicksort is an algorithm that orders the elements of an array.",
        "A veterinarian is a doctor who cares for pets and farm animals.",
    ]
    scores = encoder.encode(questions, prefix) @ encoder.encode(passages).T
    assert scores.argmax(axis=1).tolist() == [0, 1, 2, 3]
