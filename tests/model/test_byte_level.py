"""Tokenizers of bytes, as Nemotron-3-Embed has: the ids are the library's, cut where told."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from model.batch import RunnerOptions
from model.config import ModelConfig
from model.errors import CheckpointError, InputTooLongError
from model.families import Side
from model.runner import ModelRunner
from model.tokenizer import BOS_ID, NVEmbedTokenizer, Truncation
from server.engine.inputs import InputTokenizer
from server.engine.interface import EncodingOptions
from server.errors import ContextLengthExceededError
from tests.siblings import SIBLINGS, write_sibling

WORDS = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = [
    "why did the ferries stop in winter",
    "  two spaces, a\ttab,   three; a line\n\n  and another  ",
    "naïve café 🙂 東京都は日本の首都です <s> a literal </s>, \x00 and ▁",
    "-" * 100 + " 0123456789 " + "=" * 77,
]


@cache
def byte_level_tokenizer() -> Tokenizer:
    """Trained here, with pieces of up to 64 bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshr", k=draw.randint(1, 9))) for _ in range(300)]
    lines = [" ".join(draw.choices(words, k=30)) + "-" * 64 + "é🙂" for _ in range(60)]
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])  # type: ignore[assignment]
    tokenizer.decoder = ByteLevel()  # type: ignore[assignment]
    trainer = BpeTrainer(
        vocab_size=800,
        special_tokens=[AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    assert max(map(len, tokenizer.get_vocab())) > 32
    return tokenizer


@pytest.fixture(scope="module")
def raw() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def folder(raw: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sibling(tmp_path_factory.mktemp("bytes") / "nemotron", "nemotron-3-embed")
    raw.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> NVEmbedTokenizer:
    return NVEmbedTokenizer.from_dir(folder)


def ids_of(raw: Tokenizer, side: Side, text: str) -> list[int]:
    """By the library: BOS, then prefix and text as one."""
    raw.encode_special_tokens = True
    return [BOS_ID, *raw.encode(f"{side}: {text}", add_special_tokens=False).ids]


@pytest.mark.parametrize("side", ["query", "passage"])
def test_the_ids_are_the_librarys(raw: Tokenizer, tokenizer: NVEmbedTokenizer, side: Side) -> None:
    prompt = tokenizer.family.prompt(side)
    expected = [ids_of(raw, side, text) for text in TEXTS]
    alone = [tokenizer.encode(text, prompt, max_tokens=4096) for text in TEXTS]
    assert [encoding.ids.tolist() for encoding in alone] == expected
    assert {encoding.pool_start for encoding in alone} == {0}
    together = tokenizer.encode_batch([*TEXTS, "x" * 1200], prompt, max_tokens=4096)
    assert [encoding.ids.tolist() for encoding in together[:-1]] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("sort", ["words", "dashes", "wall"])
def test_what_is_cut_is_the_whole_cut(
    raw: Tokenizer, tokenizer: NVEmbedTokenizer, sort: str
) -> None:
    """Also where a piece is longer than any of Mistral's first vocabulary."""
    draw = random.Random(1)
    long = {
        "words": " ".join("".join(draw.choices("etaoinshr", k=5)) for _ in range(4000)),
        "dashes": ("-" * 64 + " ") * 900,
        "wall": "".join(draw.choices("etaoinshr0123456789é", k=20_000)),
    }[sort]
    prompt = tokenizer.family.prompt("query")
    whole = ids_of(raw, "query", long)
    for most in (16, 100):
        end = tokenizer.encode(long, prompt, max_tokens=most, truncate=Truncation.END)
        assert end.ids.tolist() == whole[:most]
        start = tokenizer.encode(long, prompt, max_tokens=most, truncate=Truncation.START)
        assert start.ids.tolist()[-most // 2 :] == whole[-most // 2 :]
        with pytest.raises(InputTooLongError):
            tokenizer.encode(long, prompt, max_tokens=most)
    fits = tokenizer.encode(long, prompt, max_tokens=len(whole))
    assert fits.ids.tolist() == whole


def test_the_servers_limits_know_the_longest_piece(
    raw: Tokenizer, tokenizer: NVEmbedTokenizer
) -> None:
    inputs = InputTokenizer(tokenizer, 64, Truncation.NONE)
    options = EncodingOptions(tokenizer.family.prompt("query"))
    text = "-" * 64 * 40  # more than 16 characters for each of the 64 tokens
    assert len(ids_of(raw, "query", text)) <= 64 < len(text) / 16
    (encoding,) = inputs.tokenize([text], options)
    assert encoding.ids.tolist() == ids_of(raw, "query", text)
    with pytest.raises(ContextLengthExceededError):
        inputs.tokenize(["-" * 100_000], options)


def test_such_a_model_embeds(folder: Path, tokenizer: NVEmbedTokenizer) -> None:
    runner = ModelRunner(RunnerOptions(str(folder), device="cpu", dtype="float32"))
    prompt = tokenizer.family.prompt("query")
    encodings = [tokenizer.encode(text, prompt, max_tokens=512) for text in TEXTS]
    together = runner.embed(encodings)
    for row, encoding in zip(together, encodings, strict=True):
        assert abs(row - runner.embed([encoding])[0]).max() < 1e-5


def test_other_families_have_none_of_bytes(raw: Tokenizer, tmp_path: Path) -> None:
    folder = write_sibling(tmp_path / "e5", "e5-mistral")
    raw.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="its pre_tokenizer has"):
        NVEmbedTokenizer.from_dir(folder)


IN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REMOVING = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "Removed",
    "invert": False,
}


@pytest.mark.parametrize(
    "change",
    [
        IN_BYTES | {"add_prefix_space": True},
        {"type": "Sequence", "pretokenizers": [REMOVING, IN_BYTES]},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]},
    ],
    ids=["adds a space", "removes spaces", "of no kind"],
)
def test_what_would_lose_or_add_characters(
    change: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"pre_tokenizer": change}))
    config = ModelConfig.from_dict(SIBLINGS["nemotron-3-embed"].config)
    with pytest.raises(CheckpointError, match="its pre_tokenizer has"):
        NVEmbedTokenizer.from_dir(tmp_path, config=config)
