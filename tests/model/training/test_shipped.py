"""The model that ships: its size, its papers, and that its vectors mean something."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from model.chunks import Chunks
from model.encoder import Encoder
from model.hub import locate, packaged_checkpoint
from model.prompts import NO_PROMPT
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


def test_its_tokenizer_is_the_official_one_in_small_letters(encoder: Encoder) -> None:
    """But for runs of spaces within a text, which it joins sooner: it was trained so."""
    texts = ["Hello world\n", "NAÏVE 漢字 🙂", "x" * 50, "</S> x", "</s> x"]
    shipped = [encoder.tokenizer.encode(text, max_tokens=200).ids.tolist() for text in texts]
    official = official_tokenizer()
    official.encode_special_tokens = True
    assert shipped == [[*official.encode(text.lower()).ids, 2] for text in texts]


def test_the_case_of_a_text_changes_nothing(encoder: Encoder) -> None:
    text = "who was king of naïve île-de-france in 1789?"
    cases = [text, text.upper(), text.title(), text.capitalize()]
    assert len(set(cases)) == 4
    for prefix in ("", query_prefix("Given a question, retrieve passages that answer it")):
        encodings = [encoder.tokenizer.encode(case, prefix, max_tokens=200) for case in cases]
        assert {encoding.pool_start for encoding in encodings} == {encodings[0].pool_start}
        assert {tuple(encoding.ids) for encoding in encodings} == {tuple(encodings[0].ids)}
        vectors = encoder.encode(cases, prefix)
        np.testing.assert_array_equal(vectors, vectors[:1].repeat(4, axis=0))


def test_parts_of_a_text_in_capitals_are_those_of_the_text_as_written(encoder: Encoder) -> None:
    """Some capitals become two small letters, or take more bytes, or fewer."""
    text = "İSTANBUL Is BIG. ΑΣ  İİ Ⱥ, \u212aELVIN Ünİt\nEND"
    spans = encoder.tokenizer.spans(text, NO_PROMPT, Chunks("size", size=1), max_tokens=200)
    whole = encoder.tokenizer.encode(text, max_tokens=200).ids.tolist()
    pieces = [official_tokenizer().id_to_token(i) or "" for i in whole[1:-1]]
    marked: set[int] = set()
    for encoding, piece in zip(spans, pieces, strict=True):
        assert encoding.span is not None
        first, end = encoding.span.characters
        marked |= set(range(first, end))
        if not piece.startswith("<0x"):
            assert piece.strip("▁") in text[first:end].lower(), (piece, text[first:end])
    assert {at for at, letter in enumerate(text) if not letter.isspace()} <= marked
    words = ("İSTANBUL", "İİ", "Ⱥ,", "\u212aELVIN", "END")
    runs = tuple((text.index(word), text.index(word) + len(word)) for word in words)
    found = encoder.tokenizer.spans(
        text, NO_PROMPT, Chunks("characters", runs=runs), max_tokens=200
    )
    shown = [text[slice(*encoding.span.characters)] for encoding in found if encoding.span]
    assert shown == list(words)


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
