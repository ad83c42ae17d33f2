from __future__ import annotations

import gc
import json
import random
import string
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, processors
from tokenizers.models import BPE

from model.batch import Encoding
from model.config import ModelConfig
from model.errors import CheckpointError, EmptyPoolError, InputTooLongError
from model.tokenizer import BOS_ID, EOS_ID, NVEmbedTokenizer, Truncation, query_prefix
from tests.checkpoints import config_json, official_tokenizer, small_tokenizer_json
from tests.model.test_files import IN_PLACE_OF_A_FILE

CONFIG = ModelConfig.from_dict(config_json())
PREFIX = query_prefix("Given a question, retrieve passages that answer the question")
LONG = 1_000_000  # tokens: no limit for these tests' texts


def whole_ids(tokenizer: NVEmbedTokenizer, text: str, instruction: str = "") -> list[int]:
    """The ids of the untruncated input: its limit is too high for the character clip."""
    ids: list[int] = tokenizer.encode(text, instruction, max_tokens=LONG).ids.tolist()
    return ids


@cache
def prose(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    letters = string.ascii_lowercase * 3 + "éß,.-"
    return " ".join(
        "".join(rng.choices(letters, k=rng.randint(1, 9))) + " " * rng.choice([0, 0, 0, 3])
        for _ in range(words)
    )


def cjk(chars: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("東京都は日本の首都です。人口約千四百万人", k=chars))


def wall(chars: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(string.ascii_letters + string.digits, k=chars))


def test_the_known_example(tokenizer: NVEmbedTokenizer) -> None:
    encoding = tokenizer.encode("are judo throws allowed in wrestling?", PREFIX, max_tokens=4096)
    assert (len(encoding), encoding.pool_start) == (28, 18)
    assert encoding.ids[:4].tolist() == [BOS_ID, 560, 1356, 28747]
    assert encoding.ids[-1] == EOS_ID


def test_special_tokens_in_a_text_are_text(tokenizer: NVEmbedTokenizer) -> None:
    for literal in ("</s>", "<s>", "<unk>"):
        ids = tokenizer.encode(f"before {literal} after", max_tokens=64).ids.tolist()
        assert ids[0] == BOS_ID
        assert ids[-1] == EOS_ID
        assert not {0, BOS_ID, EOS_ID} & set(ids[1:-1])
    # "▁a", "▁</", "s", ">", "▁b": pieces like any others
    ids = tokenizer.encode("a </s> b", max_tokens=64).ids.tolist()
    assert ids == [BOS_ID, 264, 1867, 28713, 28767, 287, EOS_ID]


def test_a_prefix_without_trailing_space_leaves_its_last_piece_in_the_pool(
    tokenizer: NVEmbedTokenizer,
) -> None:
    # The reference counts the instruction without BOS and compares with positions that have it.
    assert tokenizer.pool_start("") == 0
    encoding = tokenizer.encode("x", "Query:", max_tokens=9)
    assert encoding.ids.tolist() == [BOS_ID, 16580, 28747, 28744, EOS_ID]  # ▁Query, :, x
    assert encoding.pool_start == 2


def test_without_truncation_a_long_input_is_refused(tokenizer: NVEmbedTokenizer) -> None:
    with pytest.raises(InputTooLongError, match="has 5 tokens, the limit is 4") as refusal:
        tokenizer.encode("one two three", max_tokens=4)
    assert (refusal.value.num_tokens, refusal.value.max_tokens) == (5, 4)
    assert len(tokenizer.encode("one two three", max_tokens=5)) == 5


def test_truncation_at_the_end_loses_eos(tokenizer: NVEmbedTokenizer) -> None:
    whole = whole_ids(tokenizer, "one two three four five")
    encoding = tokenizer.encode("one two three four five", max_tokens=4, truncate=Truncation.END)
    assert encoding.ids.tolist() == whole[:4]


def test_truncation_at_the_start_keeps_instruction_and_eos(tokenizer: NVEmbedTokenizer) -> None:
    text = "one two three four five six seven eight"
    whole = whole_ids(tokenizer, text, PREFIX)
    encoding = tokenizer.encode(text, PREFIX, max_tokens=22, truncate=Truncation.START)
    assert encoding.ids.tolist() == whole[:18] + whole[-4:]
    assert encoding.pool_start == 18
    bare = tokenizer.encode(text, max_tokens=4, truncate=Truncation.START)
    assert bare.ids.tolist() == [BOS_ID, *whole[-3:-1], EOS_ID]


@pytest.mark.parametrize("truncate", [Truncation.END, Truncation.START])
def test_nothing_left_to_pool(tokenizer: NVEmbedTokenizer, truncate: Truncation) -> None:
    with pytest.raises(EmptyPoolError, match="instruction takes 18 tokens"):
        tokenizer.encode("a question", PREFIX, max_tokens=18, truncate=truncate)
    assert len(tokenizer.encode("a question", PREFIX, max_tokens=19, truncate=truncate)) == 19


@pytest.mark.parametrize("instruction", ["", PREFIX, "Query:"], ids=["none", "official", "bare"])
@pytest.mark.parametrize(
    "written",
    [
        lambda: prose(6_000),
        lambda: cjk(20_000),
        lambda: wall(20_000),
        lambda: (" " * 70).join(prose(1_000)),
        lambda: "x" + "\n" * 20_000,
        lambda: wall(3_000) + " " + prose(2_000) + " " + wall(3_000),
    ],
    ids=["prose", "cjk", "wall", "spaces", "newlines", "walls around prose"],
)
def test_the_character_clip_changes_no_id(
    tokenizer: NVEmbedTokenizer, written: Callable[[], str], instruction: str
) -> None:
    text = written()
    whole = whole_ids(tokenizer, text, instruction)
    start = tokenizer.pool_start(instruction)
    for max_tokens in (start + 5, start + 64, start + 400):
        assert len(text) > 16 * max_tokens, "this text would not be clipped"
        end = tokenizer.encode(text, instruction, max_tokens=max_tokens, truncate=Truncation.END)
        assert end.ids.tolist() == whole[:max_tokens]
        head = max(start, 1)
        tail = tokenizer.encode(text, instruction, max_tokens=max_tokens, truncate=Truncation.START)
        assert tail.ids.tolist() == whole[:head] + whole[head - max_tokens :]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=9),
    spaces=st.integers(1, 20),
    instruction=st.sampled_from(["", "Query:", "Instruct: x\nQuery: "]),
    max_tokens=st.integers(14, 24),
)
def test_the_character_clip_on_any_words(
    tokenizer: NVEmbedTokenizer,
    words: list[str],
    spaces: int,
    instruction: str,
    max_tokens: int,
) -> None:
    text = (" " * spaces).join(words)
    whole = whole_ids(tokenizer, text, instruction)
    if len(whole) <= max_tokens:
        return
    start = tokenizer.pool_start(instruction)
    end = tokenizer.encode(text, instruction, max_tokens=max_tokens, truncate=Truncation.END)
    assert end.ids.tolist() == whole[:max_tokens]
    head = max(start, 1)
    tail = tokenizer.encode(text, instruction, max_tokens=max_tokens, truncate=Truncation.START)
    assert tail.ids.tolist() == whole[:head] + whole[head - max_tokens :]


ODD = "\ufdfa"  # three pieces, one for each of its bytes


@pytest.mark.parametrize(
    "written",
    [
        lambda: ODD * 500_000,
        lambda: "letters " * 17_000 + ODD * 400_000,
        lambda: ODD * 600_000 + " " + ODD * 600_000,
        lambda: " ".join([prose(9_000)] * 11),
    ],
    ids=["dense", "dense later", "dense on both sides", "prose"],
)
@pytest.mark.parametrize("truncate", list(Truncation))
def test_few_more_pieces_are_made_than_are_kept(
    tokenizer: NVEmbedTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    written: Callable[[], str],
    truncate: Truncation,
) -> None:
    """Each takes the library some 60 bytes, and 16 characters a token could make 1.7 million."""
    counts = []
    ids_of = tokenizer._ids

    def counted(prompts: Sequence[str], **options: bool) -> list[list[int]]:
        ids = ids_of(prompts, **options)
        counts.append(sum(map(len, ids)))
        return ids

    monkeypatch.setattr(tokenizer, "_ids", counted)
    (result,) = tokenizer.encode_batch([written()], PREFIX, max_tokens=32_768, truncate=truncate)
    assert max(counts, default=0) < 700_000
    if truncate is Truncation.NONE:
        assert isinstance(result, InputTooLongError)
    else:
        assert isinstance(result, Encoding)
        assert len(result) == 32_768


@pytest.mark.parametrize("word", [ODD, "🙂", "letters ", "x", "\n", " "])
@pytest.mark.parametrize("times", [0.2, 0.5, 1.2, 3, 6, 13])
def test_how_much_is_tokenized_changes_no_id(
    tokenizer: NVEmbedTokenizer, word: str, times: float
) -> None:
    """Texts that become dense, or stop being so, anywhere between 1 and 16 characters a token."""
    max_tokens = 6_000
    text = (
        word * int(times * max_tokens / len(word))
        + " "
        + " ".join(prose(2_000).split())
        + ODD * 9_000
    )
    whole = whole_ids(tokenizer, text, PREFIX)
    assert len(whole) > max_tokens
    start = tokenizer.pool_start(PREFIX)
    for truncate in (Truncation.END, Truncation.START):
        ids = tokenizer.encode(text, PREFIX, max_tokens=max_tokens, truncate=truncate).ids.tolist()
        if truncate is Truncation.END:
            assert ids == whole[:max_tokens]
        else:
            assert ids == whole[:start] + whole[start - max_tokens :]
    with pytest.raises(InputTooLongError):
        tokenizer.encode(text, PREFIX, max_tokens=max_tokens)


@pytest.mark.parametrize("letters", [10, 1_023, 1_024, 1_500, 3_000])
@pytest.mark.parametrize(
    ("instruction", "continued"),
    [("do: instruc", "tions"), ("do: inter nat", "ional"), ("do: re", "present"), ("", "x")],
)
def test_the_first_word_merges_with_the_instruction(
    tokenizer: NVEmbedTokenizer, letters: int, instruction: str, continued: str
) -> None:
    """However long it is: of the instruction's last word the pieces depend on it."""
    rest = prose(3_000)
    text = continued + "".join(random.Random(1).choices("aeioubcd", k=letters)) + " " + rest
    whole = whole_ids(tokenizer, text, instruction)
    start = tokenizer.pool_start(instruction)
    for max_tokens in (start + 120, start + 400):
        assert len(rest) > 2 * 16 * max_tokens, "this text would not be clipped"
        tail = tokenizer.encode(text, instruction, max_tokens=max_tokens, truncate=Truncation.START)
        head = max(start, 1)
        assert tail.ids.tolist() == whole[:head] + whole[head - max_tokens :]


@pytest.fixture
def tokenized(tokenizer: NVEmbedTokenizer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what the library was given, in characters."""
    lengths: list[int] = []
    ids = tokenizer._ids

    def count(prompts: Sequence[str], **options: bool) -> list[list[int]]:
        lengths.extend(map(len, prompts))
        return ids(prompts, **options)

    monkeypatch.setattr(tokenizer, "_ids", count)
    return lengths


def test_a_huge_text_is_refused_or_cut_without_tokenizing_it(
    tokenizer: NVEmbedTokenizer, tokenized: list[int]
) -> None:
    huge = prose(1_000) * 1_500  # more than 8 MB: 16 seconds to tokenize
    assert len(huge) > 8_000_000
    with pytest.raises(InputTooLongError, match="more than 4096 tokens"):
        tokenizer.encode(huge, max_tokens=4096)
    (refused,) = tokenizer.encode_batch([huge], max_tokens=4096)
    assert isinstance(refused, InputTooLongError)
    assert refused.num_tokens is None
    for truncate in (Truncation.END, Truncation.START):
        assert len(tokenizer.encode(huge, PREFIX, max_tokens=512, truncate=truncate)) == 512
    assert 0 < sum(tokenized) < 500_000


@pytest.mark.parametrize("truncate", list(Truncation))
@pytest.mark.parametrize("instruction", ["", PREFIX])
def test_batch_equals_one_by_one(
    tokenizer: NVEmbedTokenizer, truncate: Truncation, instruction: str
) -> None:
    texts = ["", "x", "naïve café", "a </s> b", prose(200), "  two", wall(900), "🙂"]
    results = tokenizer.encode_batch(texts, instruction, max_tokens=24, truncate=truncate)
    assert len(results) == len(texts)
    for text, result in zip(texts, results, strict=True):
        if isinstance(result, Encoding):
            alone = tokenizer.encode(text, instruction, max_tokens=24, truncate=truncate)
            assert result.ids.tolist() == alone.ids.tolist()
            assert result.pool_start == alone.pool_start
        else:
            with pytest.raises(InputTooLongError) as refusal:
                tokenizer.encode(text, instruction, max_tokens=24, truncate=truncate)
            assert str(result) == str(refusal.value)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)
    others = Tokenizer(BPE())
    others.add_tokens(["</s>", "<s>"])
    with pytest.raises(CheckpointError, match="id 1 and </s> id 2"):
        NVEmbedTokenizer(others)
    with_long_piece = official_tokenizer()
    with_long_piece.add_tokens(["a piece of more than sixteen characters"])
    with pytest.raises(CheckpointError, match="at most 16"):
        NVEmbedTokenizer(with_long_piece)


Change = Callable[[dict[str, Any]], object]
DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
REGEX = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}
MALFORMED = {"type": "Replace", "pattern": {"Regex": "(("}, "content": "x"}
BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
SPECIAL = {"SpecialToken": {"id": "<absent>", "type_id": 0}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(normalizer=DOUBLING), "its normalizer has"),
        (
            lambda raw: raw.update(normalizer={"type": "Sequence", "normalizers": [DOUBLING] * 20}),
            "its normalizer has",
        ),
        (lambda raw: raw.update(normalizer=REGEX), "its normalizer has"),
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "its normalizer has"),
        (lambda raw: raw.update(normalizer=MALFORMED), "cannot be read"),
        (
            lambda raw: raw.update(normalizer={"type": "Prepend", "prepend": "▁" * 10_000}),
            "its normalizer has",
        ),
        (
            lambda raw: raw.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
            ),
            "cannot be read",
        ),
        (lambda raw: raw.update(normalizer={"type": "Sequence"}), "cannot be read"),
        (lambda raw: raw.update(normalizer="NFC"), "cannot be read"),
        (
            lambda raw: raw.update(pre_tokenizer=BYTES),
            "its pre_tokenizer has",
        ),
        (
            lambda raw: raw.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [SPECIAL],
                    "pair": [SPECIAL],
                    "special_tokens": {},
                }
            ),
            "cannot be read",
        ),
        (lambda raw: raw.update(post_processor=BYTES), "its post_processor"),
        (lambda raw: raw["model"].update(dropout=0.5), "its dropout is 0.5"),
        (
            lambda raw: raw["model"].update(continuing_subword_prefix="éé"),
            "affix continuing_subword_prefix",
        ),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "affix end_of_word_suffix"),
        (lambda raw: raw["model"].update(unk_token="<absent>"), "its unk_token"),
        (lambda raw: raw["model"].update(type="Unigram"), "cannot be read|its model is Unigram"),
        (lambda raw: raw["model"]["vocab"].update(zzz=5), "gives two pieces one id"),
        (lambda raw: raw["model"]["vocab"].update(zzz=-1), "cannot be read"),
        (lambda raw: raw["model"]["vocab"].update(zzz=[5]), "cannot be read"),
        (lambda raw: raw["model"].update(vocab={}, merges=[]), "unk_token|Unk token"),
        (lambda raw: raw["model"].update(vocab=["a"]), "cannot be read"),
        (lambda raw: raw["model"].update(merges=["absent pieces"]), "cannot be read"),
        (lambda raw: raw.update(model=None), "cannot be read"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused(
    tmp_path: Path, change: Change, message: str
) -> None:
    """It could multiply a word, leave merges out at random, or end the process."""
    (tmp_path / "tokenizer.json").write_text(small_tokenizer_json())
    assert NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG).vocab_size == 300
    raw = json.loads(small_tokenizer_json())
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message) as refusal:
        NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)
    assert "tokenizer.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_what_lies_in_place_of_a_tokenizer(tmp_path: Path) -> None:
    for content, message in [*IN_PLACE_OF_A_FILE, (b"[" * 20_000, ""), (b"[]", "")]:
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json cannot be read: .*{message}"):
            NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)


def test_a_mark_truncation_and_padding_change_no_id(
    tmp_path: Path, golden_checkpoint: Path, tokenizer: NVEmbedTokenizer
) -> None:
    raw = json.loads((golden_checkpoint / "tokenizer.json").read_text())
    raw["truncation"] = {
        "max_length": 0,
        "strategy": "LongestFirst",
        "stride": 5,
        "direction": "Right",
    }
    raw["padding"] = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": 0,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<unk>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8-sig")
    other = NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)
    text = "the same ids, and as many"
    assert (
        other.encode(text, max_tokens=64).ids.tolist()
        == tokenizer.encode(text, max_tokens=64).ids.tolist()
    )


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(tmp_path: Path) -> None:
    """An added [PAD] would be an id that no row of the embedding table stands for."""
    larger = official_tokenizer()
    larger.add_tokens(["[PAD]"])
    larger.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(config_json()))
    with pytest.raises(CheckpointError, match="32001 pieces, the model embeds 32000"):
        NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)


def test_an_instruction_that_cannot_fit_is_not_tokenized(tokenizer: NVEmbedTokenizer) -> None:
    for truncate in Truncation:
        with pytest.raises(InputTooLongError):
            tokenizer.encode("x", "word " * 100, max_tokens=24, truncate=truncate)


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace("a", "b" * 10_000_000),
        normalizers.Replace(Regex("a?"), "b" * 100),
        normalizers.Prepend("▁" * 1000),
        normalizers.Sequence([normalizers.Replace("a", "a" * 10)] * 7),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Sequence([normalizers.NFKD()])]),
    ],
    ids=["replace", "pattern", "prepend", "each a little", "nested"],
)
def test_a_normaliser_that_makes_much_of_little_is_refused(
    normalizer: normalizers.Normalizer, tmp_path: Path
) -> None:
    raw = Tokenizer.from_str(small_tokenizer_json())
    raw.normalizer = normalizer
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="its normalizer has"):
        NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)


def test_small_letters_for_capitals_change_no_length_rule(tmp_path: Path) -> None:
    """A lower-casing normaliser: the ids are those of the small text, and clipping changes none.

    "İ" alone becomes two characters, three pieces of bytes: no more than clipping reckons with."""
    raw = Tokenizer.from_str(small_tokenizer_json())
    raw.normalizer = normalizers.Sequence([normalizers.Lowercase(), raw.normalizer])
    raw.save(str(tmp_path / "tokenizer.json"))
    lowering = NVEmbedTokenizer.from_dir(tmp_path, config=CONFIG)
    texts = ["Straße AND Ǆ", "İSTANBUL ẞ", "İ İSTANBUL " * 30, "SOME Words " * 90, "ΑΣ Ⱥ" * 80]
    for text in texts:
        whole = lowering.encode(text, "Instruct: X", max_tokens=4000).ids
        small = lowering.encode(text.lower(), "instruct: x", max_tokens=4000).ids
        if "Σ" not in text:  # a final sigma is the library's to tell
            assert whole.tolist() == small.tolist(), text
        assert len(whole) <= 3 + len("Instruct: X") + 4 * len(text)
        cut = lowering.encode(text, "Instruct: X", max_tokens=24, truncate=Truncation.END).ids
        assert cut.tolist() == whole.tolist()[:24]
        cut = lowering.encode(text, "Instruct: X", max_tokens=24, truncate=Truncation.START).ids
        assert cut.tolist()[-5:] == whole.tolist()[-5:]


def test_refused_texts_are_not_kept(tokenizer: NVEmbedTokenizer) -> None:
    """They would be, until cycles are collected, if an error kept the frame that keeps it."""

    class Text(str):
        """One that can be watched."""

    def refuse() -> list[weakref.ref[Text]]:
        texts = [Text("x" * 10_000), Text("some words " * 20), Text("a")]
        results = tokenizer.encode_batch(texts, max_tokens=16)
        assert [isinstance(r, InputTooLongError) for r in results] == [True, True, False]
        return [weakref.ref(text) for text in texts]

    gc.disable()
    try:
        assert [text() for text in refuse()] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("single", ["$A", "$A </s>", "<s> $A </s>", "<s> " * 50_000 + "$A"])
def test_what_the_tokenizers_own_template_puts_around_a_text_does_not_matter(
    tokenizer: NVEmbedTokenizer, single: str
) -> None:
    """BOS and EOS are put by this project, once each."""
    raw = official_tokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = NVEmbedTokenizer(raw).encode("some words", PREFIX, max_tokens=99).ids
    assert ids.tolist() == tokenizer.encode("some words", PREFIX, max_tokens=99).ids.tolist()


@pytest.mark.parametrize("first_word", [10, 20_000, 3_000_000])
def test_a_first_word_without_an_end_is_not_tokenized(
    tokenizer: NVEmbedTokenizer, tokenized: list[int], first_word: int
) -> None:
    """START keeps the first word, unless it is a wall: of that, a text of 3 MB has seconds."""
    text = "w" * first_word + " and then some words" * 10_000
    encoding = tokenizer.encode(text, PREFIX, max_tokens=100, truncate=Truncation.START)
    assert 0 < sum(tokenized) < 300_000
    alone = tokenizer.encode("and then some words", max_tokens=100)
    assert len(encoding) == 100
    assert encoding.ids[-4:].tolist() == alone.ids[-4:].tolist()
