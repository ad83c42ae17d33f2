"""text + what stands around it -> Encoding. Owns BOS, EOS, truncation, and what is pooled.

Torch-free: the front process tokenizes. BOS, EOS and a template's markers are ids that are put
here, whatever the tokenizer's own settings say. The rules are the authors' of each family, to the
off-by-one; where families differ, their rows in `model.families` say so. NV-Embed appends EOS
before truncation, truncation keeps the first tokens, and the pool leaves out
`len(tokenize(instruction))` positions, counted without BOS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from model import families
from model.batch import Encoding, Part, Span
from model.chunks import Chunks, own_places
from model.config import ModelConfig
from model.errors import CheckpointError, EmptyPoolError, InputTooLongError, UnsupportedError
from model.families import NV_EMBED, Family
from model.prompts import NO_PROMPT, Marker, Parts, Prompt, joined
from model.tokenizer_file import is_byte_level, read_tokenizer

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
_PIECE_CHARS, _PIECE_BYTES = 16, 256
"""No piece of Mistral's first vocabulary stands for more characters than this, and none of one of
bytes for more bytes (checked when loading)."""
_MAX_CHARACTER_IDS = 4
"""No character becomes more pieces than its bytes in UTF-8."""
_CHARS_A_TOKEN = (4, 8)
"""Of a long text so many characters for each token of the limit are tried, in turn, and then as
many as there can be."""


def query_prefix(task: str) -> str:
    """What NV-Embed's authors write before the text of a query; passages get nothing."""
    assert NV_EMBED.template is not None
    return NV_EMBED.template.replace("{task}", task)


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
        most = _PIECE_BYTES if is_byte_level(tokenizer) else _PIECE_CHARS
        if longest > most:
            raise CheckpointError(
                f"tokenizer.json has a piece of {longest} characters; the length limit relies on "
                f"at most {most}, as in NV-Embed's tokenizer"
            )
        self.max_piece_chars = max(longest, _PIECE_CHARS)
        """A text has no fewer ids than its characters divided by this."""
        if (vocabulary.get("<s>"), vocabulary.get("</s>")) != (BOS_ID, EOS_ID):
            raise CheckpointError("tokenizer.json does not give <s> id 1 and </s> id 2")
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        if missing := [marker for marker in family.markers if marker not in special]:
            raise CheckpointError(
                f"tokenizer.json has no special token {', '.join(missing)}, which a {family.name} "
                "model's template writes"
            )
        for other in families.FAMILIES:
            if not family.markers and other.markers and special.issuperset(other.markers):
                raise CheckpointError(
                    f"tokenizer.json has the markers of {other.name}, and this is taken for "
                    f"{family.name}: name its --family"
                )
        self._marker_ids = {marker: vocabulary[marker] for marker in family.markers}
        self._frame = lru_cache(maxsize=1024)(self._framed)

    @classmethod
    def from_dir(
        cls, folder: Path, family: str = "auto", *, config: ModelConfig | None = None
    ) -> NVEmbedTokenizer:
        """Read `folder/tokenizer.json`, and the family from what lies beside it.

        family: as in ModelConfig.from_dir. config: of the model that the tokenizer is for, where
        the folder's own is another.
        """
        config = config or ModelConfig.from_dir(folder, family)
        tokenizer = read_tokenizer(folder, byte_level=config.family.byte_level)
        ours = cls(tokenizer, config.family)
        if ours.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} has {ours.vocab_size} pieces, the model embeds "
                f"{config.vocab_size}: it is not its own"
            )
        return ours

    def pool_start(self, prompt: str | Prompt) -> int:
        """Number of leading positions that a prompt takes out of the pool."""
        return self._frame_of(self._prompt(prompt)).pool_start

    def prompt_tokens(self, prompt: str | Prompt) -> int:
        """Number of ids that a prompt without examples adds to a text's own."""
        frame = self._frame_of(self._prompt(prompt))
        return frame.leading + len(frame.tail)

    def _prompt(self, prompt: str | Prompt) -> Prompt:
        return self.family.verbatim(prompt) if isinstance(prompt, str) else prompt

    def _frame_of(self, prompt: Prompt) -> _Frame:
        short = prompt.num_chars <= _CACHED_CHARS  # clients send what they like
        return self._frame(prompt) if short else self._framed(prompt)

    def _framed(self, prompt: Prompt) -> _Frame:
        around = prompt.prefix if prompt.round_trip else joined(prompt.examples, prompt.prefix)
        before = _segments(around)
        (_, trail), *behind = _segments(prompt.suffix)
        lead = before[-1].text
        head = self._ids_of([*before[:-1], before[-1]._replace(text="")])
        leading = len(head) + len(self._ids_of_text(lead))
        pool_start = 0
        if prompt.prefix and self.family.pooled == "text":
            # GritLM's authors count BOS, NV-Embed's do not. Because the official prefix ends with
            # a space, whose lone "▁" piece merges into the first word, that is BOS and just the
            # instruction.
            pool_start = leading + (self.family.left_out == "prefix")
        trail_ids = tuple(self._ids_of_text(f"x{trail}")[len(self._ids_of_text("x")) :])
        return _Frame(
            head=tuple(head),
            lead=lead,
            trail=trail,
            trail_ids=trail_ids,
            tail=(*trail_ids, *self._ids_of(behind)),
            leading=leading,
            pool_start=pool_start,
            kept=pool_start or leading + (not lead.endswith(" ")),
            uncounted=len(self._ids_of(_segments(prompt.examples))),
        )

    def _ids_of(self, segments: Sequence[_Segment]) -> list[int]:
        ids: list[int] = []
        for marker, text in segments:
            if marker is not None:
                ids.append(self._marker_ids[marker.token])
            ids += self._ids_of_text(text)
        return ids

    def _ids_of_text(self, text: str) -> list[int]:
        """Without BOS and EOS; what a text of its own begins with is in front."""
        return self._ids([text])[0] if text else []

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) == 1 and len(texts[0]) <= _SHORT_CHARS:
            return [self._tokenizer.encode(texts[0], add_special_tokens=False).ids]
        many = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in many]

    def encode(
        self,
        text: str,
        instruction: str | Prompt = "",
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
        instruction: str | Prompt = "",
        *,
        max_tokens: int,
        truncate: Truncation = Truncation.NONE,
    ) -> list[Encoding | InputTooLongError | EmptyPoolError]:
        """Tokenize many texts on the library's threads; a refused one gives its error in place.

        instruction: verbatim before each, or all that stands around each. Of a long text only a
        part is tokenized, and a longer one where that had too few ids: the library needs some 60
        bytes for each id, and 8 MB of text take it 16 seconds.
        """
        prompt = self._prompt(instruction)
        frame = self._frame_of(prompt)
        lead, trail = frame.lead, "" if prompt.round_trip else frame.trail
        longest = self.max_piece_chars * max_tokens
        if len(lead) + max(map(len, texts), default=0) <= _CHARS_A_TOKEN[0] * max_tokens:
            return [  # nothing needs to be clipped, as nearly always
                self._result(ids, _WHOLE, prompt, frame, max_tokens, truncate)
                for ids in self._ids([lead + text + trail for text in texts])
            ]
        results: dict[int, Encoding | InputTooLongError | EmptyPoolError] = {
            index: InputTooLongError(None, max_tokens)
            for index, text in enumerate(texts)
            if len(lead) + len(text) > longest
            and (truncate is Truncation.NONE or len(lead) > longest)
        }
        for chars_a_token in (*_CHARS_A_TOKEN, self.max_piece_chars):
            left = [index for index in range(len(texts)) if index not in results]
            most = chars_a_token * max_tokens
            if not left or len(lead) > most:
                continue
            clips = [
                _clip(texts[index], lead, most, truncate, self.max_piece_chars) for index in left
            ]
            encoded = self._ids([c.prompt + trail if c.is_whole else c.prompt for c in clips])
            for index, clip, ids in zip(left, clips, encoded, strict=True):
                if clip.is_whole or most == longest or len(ids) >= max_tokens + clip.blurred_ids:
                    results[index] = self._result(ids, clip, prompt, frame, max_tokens, truncate)
        return [results[index] for index in range(len(texts))]

    def _result(
        self,
        ids: list[int],
        clip: _Clip,
        prompt: Prompt,
        frame: _Frame,
        max_tokens: int,
        truncate: Truncation,
    ) -> Encoding | InputTooLongError | EmptyPoolError:
        """ids: of the clip, and of the frame's trail where the clip is whole."""
        if truncate is Truncation.NONE and not clip.is_whole:
            return InputTooLongError(None, max_tokens)
        try:
            if prompt.round_trip:
                return self._round_trip(ids, prompt, max_tokens, truncate)
            trail = len(frame.trail_ids) if clip.is_whole else 0
            tail = frame.tail[trail:]
            whole = [BOS_ID, *frame.head, *ids, *tail]
            return self._cut(whole, frame, max_tokens, truncate, is_cut=not clip.is_whole)
        except (InputTooLongError, EmptyPoolError) as error:
            # Its traceback holds this frame, which holds it: the texts would stay until the next
            # collection of cycles.
            return error.with_traceback(None)

    def parts(self, text: str, prompt: Prompt, *, max_tokens: int, number: int) -> list[Encoding]:
        """A text that is too long, as several inputs with the prompt around each: as many ids of
        it as fit, and in the last those that are left.

        number: of the text among a request's inputs. Raises EmptyPoolError where the prompt leaves
        no room, UnsupportedError for a family that tokenizes twice.
        """
        frame = self._frame_to_split(prompt)
        (written,) = self._ids([frame.lead + text + frame.trail])
        before, ids, behind = self._split(written, frame)
        room = max_tokens + frame.uncounted - len(before) - len(behind)
        if room < 1:
            raise EmptyPoolError(len(before), max_tokens)
        pieces = [ids[first : first + room] for first in range(0, len(ids), room)]
        return [
            Encoding(
                np.array([*before, *piece, *behind], dtype=np.int32),
                frame.pool_start,
                part=Part(number, len(piece)),
            )
            for piece in pieces
        ]

    def _frame_to_split(self, prompt: Prompt) -> _Frame:
        if prompt.round_trip:
            raise UnsupportedError(f"a {self.family.name} model's texts cannot be split")
        return self._frame_of(prompt)

    def _split(self, ids: list[int], frame: _Frame) -> tuple[list[int], list[int], list[int]]:
        """ids: of a text with what is directly around it. -> all that run: before the text's own,
        those, and behind. What a prompt's last space and the first word have in common counts as
        the text's."""
        whole = [BOS_ID, *frame.head, *ids]
        first, last = max(frame.kept, 1), len(whole) - len(frame.trail_ids)
        eos = [] if self.family.keeps_eos is None else [EOS_ID]
        return whole[:first], whole[first:last], [*frame.tail, *eos]

    def spans(
        self, text: str, prompt: Prompt, chunks: Chunks, *, max_tokens: int
    ) -> list[Encoding]:
        """Runs of a text's ids, each to be pooled out of the forward of the whole text.

        A token is in the span of characters that holds its first character that is no space.
        Raises InputTooLongError, ChunksError, UnsupportedError for a family that pools one row.
        """
        if self.family.pooled == "last":
            raise UnsupportedError(f"a {self.family.name} model pools one row: it has no chunks")
        frame = self._frame_to_split(prompt)
        written = frame.lead + text + frame.trail
        # As a batch: a single call would keep the interpreter's lock, and this text may be long.
        (encoded,) = self._tokenizer.encode_batch([written], add_special_tokens=False)
        before, own, behind = self._split(encoded.ids, frame)
        ids = np.array([*before, *own, *behind], dtype=np.int32)
        if len(ids) > max_tokens:
            raise InputTooLongError(len(ids), max_tokens)
        first = len(before) - 1 - len(frame.head)
        offsets = encoded.offsets[first : first + len(own)]
        places = own_places(offsets, written, len(frame.lead), len(text))
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        return [
            Encoding(ids, len(before) + a, span=Span(len(before) + b, digest, (a, b), characters))
            for (a, b), characters in chunks.resolve(places)
        ]

    def to_encoding(self, ids: list[int], max_tokens: int, truncate: Truncation) -> Encoding:
        """Ids as a client sent them: from BOS, and to EOS where the family has it."""
        if len(ids) <= max_tokens:
            return Encoding(np.array(ids, dtype=np.int32))
        without_eos = ids[:-1] if self.family.keeps_eos is not None and ids[-1] == EOS_ID else ids
        return self._cut(without_eos, self._frame_of(NO_PROMPT), max_tokens, truncate)

    def _cut(
        self,
        ids: list[int],
        frame: _Frame,
        max_tokens: int,
        truncate: Truncation,
        is_cut: bool = False,
    ) -> Encoding:
        """Ids from BOS to the tail, without EOS, as an Encoding of at most `max_tokens`."""
        max_tokens += frame.uncounted
        keeps_eos = self.family.keeps_eos
        eos = [] if keeps_eos is None else [EOS_ID]
        num_tokens = len(ids) + len(eos)
        if num_tokens > max_tokens:
            if truncate is Truncation.NONE:
                raise InputTooLongError(num_tokens, max_tokens)
            is_cut = True
            if truncate is Truncation.END and not keeps_eos:
                eos = []
            most = max_tokens - len(eos)
            if truncate is Truncation.START:
                first = min(max(frame.kept, 1), most)
                ids = ids[:first] + ids[len(ids) - (most - first) :]
            else:
                behind = min(len(frame.tail), most - 1)
                ids = ids[: most - behind] + ids[len(ids) - behind :]
        ids = ids + eos
        if frame.pool_start >= len(ids):
            raise EmptyPoolError(frame.pool_start, max_tokens)
        return Encoding(np.array(ids, dtype=np.int32), frame.pool_start, is_cut)

    def _round_trip(
        self, ids: list[int], prompt: Prompt, max_tokens: int, truncate: Truncation
    ) -> Encoding:
        """As the authors of bge-en-icl: prefix and text are tokenized, cut, decoded and tokenized
        again. So a lone "▁" follows each marker, and the result may be longer than the limit,
        which leaves room for what stands behind and counts no examples.

        ids: of the text and what is directly before it."""
        segments = _segments(prompt.prefix)
        behind = _segments(prompt.suffix)
        parts = [self._ids_of([segment]) for segment in segments[:-1]]
        parts.append([*self._ids_of([segments[-1]._replace(text="")]), *ids])
        total = sum(map(len, parts))
        most = max_tokens - 2 - len(self._ids_of(behind))  # BOS and EOS
        is_cut = total > most
        if is_cut and truncate is Truncation.NONE:
            raise InputTooLongError(total + max_tokens - most, max_tokens)
        if total > most and truncate is Truncation.START:
            markers = len(parts[-1]) - len(ids)
            room = max(0, most - (total - len(ids)))
            parts[-1] = parts[-1][:markers] + ids[len(ids) - room :]
        again: list[_Segment] = []
        for (marker, _), part in zip(segments, parts, strict=True):
            kept, most = part[: max(most, 0)], most - len(part)
            if marker is not None and kept:
                kept = kept[1:]
            elif marker is not None:
                break
            said = self._tokenizer.decode(kept, skip_special_tokens=False)
            again.append(_Segment(marker, f" {said}" if marker is not None and kept else said))
        again = again or [_Segment(None, "")]
        again[-1] = again[-1]._replace(text=again[-1].text + behind[0].text)
        examples = _segments(prompt.examples)
        whole = [*self._ids_of(examples), *self._ids_of(again), *self._ids_of(behind[1:])]
        return Encoding(np.array([BOS_ID, *whole, EOS_ID], dtype=np.int32), is_cut=is_cut)


class _Segment(NamedTuple):
    """A text that is tokenized by itself, and the marker before it."""

    marker: Marker | None
    text: str


def _segments(parts: Parts) -> list[_Segment]:
    """One at least. A marker ends the text before it, and begins another."""
    segments = [_Segment(None, "")]
    for part in parts:
        if isinstance(part, Marker):
            segments.append(_Segment(part, ""))
        else:
            segments[-1] = segments[-1]._replace(text=segments[-1].text + part)
    return segments


class _Frame(NamedTuple):
    """What a prompt puts around the ids of a text."""

    head: tuple[int, ...]  # between BOS and the segment that holds the text
    lead: str  # directly before the text, and tokenized with it
    trail: str  # directly behind it
    trail_ids: tuple[int, ...]
    tail: tuple[int, ...]  # behind the text: `trail_ids`, and what follows them but for EOS
    leading: int  # ids of what is before the text
    pool_start: int
    kept: int  # leading ids that stay when the beginning of a text is cut
    uncounted: int  # ids of examples, which no limit counts


class _Clip(NamedTuple):
    """The part of instruction + text that is tokenized."""

    prompt: str
    is_whole: bool
    blurred_ids: int  # with so many ids more than truncation keeps, the cut changes none of those


_WHOLE = _Clip("", True, 0)


def _clip(
    text: str, instruction: str, most: int, truncate: Truncation, max_piece_chars: int
) -> _Clip:
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
    blurred_ids = margin // max_piece_chars
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
