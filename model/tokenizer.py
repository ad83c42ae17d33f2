"""text + instruction -> Encoding. Owns BOS, EOS, truncation and which positions are pooled.

Torch-free: the front process tokenizes. The rules are the reference's, to the off-by-one
(the published `encode`): EOS is appended before truncation, truncation keeps the first tokens,
and the pool leaves out `len(tokenize(instruction))` positions, counted without BOS. Where a family
differs, its row in `model.families` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from model.batch import Encoding
from model.config import ModelConfig
from model.errors import CheckpointError, EmptyPoolError, InputTooLongError
from model.families import NV_EMBED, Family
from model.tokenizer_file import read_tokenizer

BOS_ID = 1
EOS_ID = 2
_CACHED_CHARS = 2048
"""Instructions up to this length are tokenized once and remembered."""
_SHORT_CHARS = 1024
"""Up to this many characters the single call is quicker than waking the library's threads; it
keeps the interpreter's lock, so that longer texts would hold up whatever else the process does."""
_MARGIN_CHARS = 64 * 1024
"""Of a text without spaces so many characters more are tokenized than could be kept."""
_FIRST_WORD_CHARS = 1024
"""Of the first word of a text whose end is kept so many characters at most stay, too."""
MAX_PIECE_CHARS = 16
"""No piece of the vocabulary stands for more characters than this (checked when loading)."""
_MAX_CHARACTER_IDS = 4
"""No character becomes more pieces than its bytes in UTF-8."""
_CHARS_A_TOKEN = (4, 8, MAX_PIECE_CHARS)
"""Of a long text so many characters for each token of the limit are tried, in turn."""


def query_prefix(task: str, family: Family = NV_EMBED) -> str:
    """What the reference writes before the text of a query; passages get nothing."""
    return family.template.replace("{task}", task)


class Truncation(StrEnum):
    """What happens to an input that is longer than the limit."""

    NONE = "none"  # refused
    END = "end"  # the reference's: the first tokens stay; EOS goes, unless the family keeps it
    START = "start"  # BOS and instruction stay, then the last tokens and EOS


class NVEmbedTokenizer:
    """The checkpoint's tokenizer.json with the family's conventions around it."""

    def __init__(self, tokenizer: Tokenizer, family: Family = NV_EMBED) -> None:
        # Texts are data: a literal "</s>" in one is text, not the end of the sequence. (The one
        # place where we leave the reference; DECISIONS.md.)
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._tokenizer, self.family = tokenizer, family
        self.vocab_size: int = max(vocabulary.values()) + 1
        if len(set(vocabulary.values())) < len(vocabulary):
            raise CheckpointError("tokenizer.json gives two pieces one id")
        longest = max(map(len, vocabulary))
        if longest > MAX_PIECE_CHARS:
            raise CheckpointError(
                f"tokenizer.json has a piece of {longest} characters; the length limit relies on "
                f"at most {MAX_PIECE_CHARS}, as in NV-Embed's tokenizer"
            )
        if (vocabulary.get("<s>"), vocabulary.get("</s>")) != (BOS_ID, EOS_ID):
            raise CheckpointError("tokenizer.json does not give <s> id 1 and </s> id 2")
        added = tokenizer.num_special_tokens_to_add(is_pair=False)
        if added != 1 or tokenizer.encode("x").ids[0] != BOS_ID:
            raise CheckpointError("tokenizer.json does not put BOS, and only that, in front")
        self._pool_start = lru_cache(maxsize=1024)(self._count_pool_start)

    @classmethod
    def from_dir(cls, folder: Path, vocab_size: int | None = None) -> NVEmbedTokenizer:
        """Read `folder/tokenizer.json`, and the family from the config beside it.

        vocab_size: of the model that is made of NV-Embed's tokenizer and no config of its kind.
        """
        tokenizer = read_tokenizer(folder)
        config = None if vocab_size else ModelConfig.from_dir(folder)
        ours = cls(tokenizer, config.family if config else NV_EMBED)
        rows = config.vocab_size if config else vocab_size
        assert rows is not None
        if ours.vocab_size > rows:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} has {ours.vocab_size} pieces, the model embeds "
                f"{rows}: it is not its own"
            )
        return ours

    def pool_start(self, instruction: str) -> int:
        """Number of leading positions that `instruction` takes out of the pool."""
        if not instruction:
            return 0
        short = len(instruction) <= _CACHED_CHARS  # clients send what they like
        return self._pool_start(instruction) if short else self._count_pool_start(instruction)

    def _count_pool_start(self, instruction: str) -> int:
        # BOS is not counted, as in the reference. Because the official prefix ends with a space,
        # whose lone "▁" piece merges into the first word, this is BOS and just the instruction.
        return len(self._ids([instruction], add_special_tokens=False)[0])

    def _ids(self, prompts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        if len(prompts) == 1 and len(prompts[0]) <= _SHORT_CHARS:
            one = self._tokenizer.encode(prompts[0], add_special_tokens=add_special_tokens)
            return [one.ids]
        many = self._tokenizer.encode_batch_fast(prompts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in many]

    def encode(
        self,
        text: str,
        instruction: str = "",
        *,
        max_tokens: int,
        truncate: Truncation = Truncation.NONE,
    ) -> Encoding:
        """Tokenize one text.

        Raises InputTooLongError when it has more than `max_tokens` ids and `truncate` is NONE,
        EmptyPoolError when truncation leaves nothing to pool.
        """
        (result,) = self.encode_batch([text], instruction, max_tokens=max_tokens, truncate=truncate)
        if isinstance(result, Encoding):
            return result
        raise result

    def encode_batch(
        self,
        texts: Sequence[str],
        instruction: str = "",
        *,
        max_tokens: int,
        truncate: Truncation = Truncation.NONE,
    ) -> list[Encoding | InputTooLongError | EmptyPoolError]:
        """Tokenize many texts on the library's threads; a refused one gives its error in place.

        Of a long text only a part is tokenized, and a longer one where that had too few ids: the
        library needs some 60 bytes for each id, and 8 MB of text take it 16 seconds.
        """
        longest = MAX_PIECE_CHARS * max_tokens
        results: dict[int, Encoding | InputTooLongError | EmptyPoolError] = {
            index: InputTooLongError(None, max_tokens)
            for index, text in enumerate(texts)
            if len(instruction) + len(text) > longest
            and (truncate is Truncation.NONE or len(instruction) > longest)
        }
        start = self.pool_start(instruction) if len(results) < len(texts) else 0
        for chars_a_token in _CHARS_A_TOKEN:
            left = [index for index in range(len(texts)) if index not in results]
            most = chars_a_token * max_tokens
            if not left or len(instruction) > most:
                continue
            clips = [_clip(texts[index], instruction, most, truncate) for index in left]
            encoded = self._ids([clip.prompt for clip in clips])
            for index, clip, ids in zip(left, clips, encoded, strict=True):
                if clip.is_whole or most == longest or len(ids) >= max_tokens + clip.blurred_ids:
                    results[index] = self._result(ids, clip, start, max_tokens, truncate)
        return [results[index] for index in range(len(texts))]

    def _result(
        self, ids: list[int], clip: _Clip, pool_start: int, max_tokens: int, truncate: Truncation
    ) -> Encoding | InputTooLongError | EmptyPoolError:
        if truncate is Truncation.NONE and not clip.is_whole:
            return InputTooLongError(None, max_tokens)
        try:
            return self.to_encoding([*ids, EOS_ID], max_tokens, truncate, pool_start=pool_start)
        except (InputTooLongError, EmptyPoolError) as error:
            # Its traceback holds this frame, which holds it: the texts would stay until the next
            # collection of cycles.
            return error.with_traceback(None)

    def to_encoding(
        self, ids: list[int], max_tokens: int, truncate: Truncation, *, pool_start: int = 0
    ) -> Encoding:
        """As the function, by the family's rule for EOS."""
        keeps_eos = self.family.keeps_eos
        return to_encoding(ids, pool_start, max_tokens, truncate, keeps_eos=keeps_eos)


class _Clip(NamedTuple):
    """The part of instruction + text that is tokenized."""

    prompt: str
    is_whole: bool
    blurred_ids: int  # with so many ids more than truncation keeps, the cut changes none of those


def _clip(text: str, instruction: str, most: int, truncate: Truncation) -> _Clip:
    """What truncation keeps of a text, if that has `most` characters or fewer.

    A cut is made where a run of spaces begins, and no piece reaches across, so the ids that
    truncation keeps are those of the whole text. Where there is no space for long (a wall of
    text), a margin has to do: merges reach only a few pieces back, except in endless
    repetitions, whose last ids may then differ under START.
    """
    if len(instruction) + len(text) <= most:
        return _Clip(instruction + text, True, 0)
    margin = min(most, _MARGIN_CHARS)
    wall = most + margin
    blurred_ids = margin // MAX_PIECE_CHARS
    if truncate is not Truncation.START:
        prompt = instruction + text[: wall + 1]
        end = prompt.find(" ", most)
        return _Clip(prompt[: end if 0 <= end <= wall else wall], False, blurred_ids)
    # What follows the instruction decides how its last pieces merge: the text's first word stays,
    # too, or its beginning.
    before_last = max(0, len(text) - most)  # where what truncation keeps may begin
    reach = min(before_last, _FIRST_WORD_CHARS)
    head = text.find(" ", 0, reach)
    head = reach if head < 0 else head
    start = max(text.rfind(" ", head, before_last), head)
    start = _without_spaces_before(text, start)
    start = max(start, len(text) - wall, head)
    prompt = instruction + text[:head] + text[start:]
    return _Clip(prompt, False, blurred_ids + _MAX_CHARACTER_IDS * head)


def _without_spaces_before(text: str, end: int) -> int:
    """Where the run of spaces that ends at `end` begins."""
    while end and text[end - 1] in " ▁":  # "▁" is what spaces become
        end -= 1
    return end


def to_encoding(
    ids: list[int],
    pool_start: int,
    max_tokens: int,
    truncate: Truncation = Truncation.NONE,
    *,
    keeps_eos: bool = False,
) -> Encoding:
    """Ids from BOS to EOS as an Encoding of at most `max_tokens`.

    Raises InputTooLongError or EmptyPoolError.
    """
    if len(ids) > max_tokens:
        if truncate is Truncation.NONE:
            raise InputTooLongError(len(ids), max_tokens)
        most = max_tokens - keeps_eos
        head = min(max(pool_start, 1), most) if truncate is Truncation.START else most
        ids = ids[:head] + ids[len(ids) - (max_tokens - head) :]
    if pool_start >= len(ids):
        raise EmptyPoolError(pool_start, max_tokens)
    return Encoding(np.array(ids, dtype=np.int32), pool_start)
