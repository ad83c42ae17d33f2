"""Inputs -> Encodings: for HTTP requests and for lines of batch files.

Owns every refusal of an input, with its place in the request. Runs on any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from model.batch import Encoding, Part
from model.chunks import Chunks, ChunksError
from model.errors import EmptyPoolError, InputTooLongError, ModelError, UnsupportedError
from model.prompts import Prompt, num_chars
from model.tokenizer import (
    BOS_ID,
    EOS_ID,
    NVEmbedTokenizer,
    Truncation,
)
from server.engine.interface import EncodingOptions, Input, PromptedText
from server.errors import ContextLengthExceededError, InvalidRequestError
from server.settings import MAX_REQUEST_INPUTS, MAX_REQUEST_TOKENS

_CHARS_AT_ONCE = 256 * 1024
"""About a tenth of a second of one core."""
_TEXTS_AT_ONCE = 64
"""Half a millisecond in which the interpreter is held."""


class AbandonedError(Exception):
    """Nobody waits for these inputs any more."""


class InputTokenizer:
    """The tokenizer with the limits of one server or run."""

    def __init__(
        self, tokenizer: NVEmbedTokenizer, max_input_tokens: int, truncate: Truncation
    ) -> None:
        self.tokenizer, self.max_input_tokens = tokenizer, max_input_tokens
        self._truncate = truncate

    @staticmethod
    def num_chars(inputs: Sequence[Input], options: EncodingOptions) -> int:
        """What there is to tokenize, prefixes included."""
        around = options.prompt.num_chars
        return sum(
            around + len(item)
            if isinstance(item, str)
            else item.prompt.num_chars + len(item.text)
            if isinstance(item, PromptedText)
            else 0
            for item in inputs
        )

    def tokenize(
        self,
        inputs: Sequence[Input],
        options: EncodingOptions,
        abandoned: Callable[[], bool] = lambda: False,
    ) -> list[Encoding]:
        """Inputs to Encodings, each checked. Raises InvalidRequestErrors naming the input.

        abandoned: asked now and then whether nobody waits for it any more; raises AbandonedError.
        """
        truncate = self._truncate if options.truncate is None else options.truncate
        max_tokens = min(options.max_tokens or self.max_input_tokens, self.max_input_tokens)
        prompt = options.prompt
        if options.chunks is not None:
            return self._spans(inputs, prompt, options.chunks, max_tokens)
        texts = [text for text in inputs if isinstance(text, str)]
        prompted = []
        if len(texts) < len(inputs):
            prompted = [item for item in inputs if isinstance(item, PromptedText)]
        if prompt and not options.is_default and len(texts) + len(prompted) < len(inputs):
            raise InvalidRequestError(
                'an instruction cannot be put before token ids: send text, or prompt: ""',
                param="input",
            )
        self._refuse_if_hopeless(texts, prompt, max_tokens)
        for own in prompted:
            self._refuse_if_hopeless([own.text], own.prompt, max_tokens)
        encoded = self._encoded(texts, prompt, max_tokens, truncate, abandoned)
        encodings: list[Encoding] = []
        total = 0
        for index, item in enumerate(inputs):
            param = "input" if len(inputs) == 1 else f"input[{index}]"
            result: Encoding | ModelError
            if isinstance(item, str):
                result = next(encoded)
            elif isinstance(item, PromptedText):
                (result,) = self.tokenizer.encode_batch(
                    [item.text], item.prompt, max_tokens=max_tokens, truncate=truncate
                )
            else:
                result = self._from_ids(item, param, max_tokens, truncate)
            if options.averages and isinstance(result, InputTooLongError):
                if abandoned():
                    raise AbandonedError
                parts = self._parts(item, prompt, max_tokens, index, param)
            else:
                encoding = self._checked(result, param)
                if options.averages:  # its place among the encodings says no more which it is
                    encoding = replace(encoding, part=Part(index, len(encoding)))
                parts = [encoding]
            encodings += parts
            total += sum(map(len, parts))
            if total > MAX_REQUEST_TOKENS:
                raise _too_many_tokens()
        return encodings

    def _parts(
        self, item: Input, prompt: Prompt, max_tokens: int, index: int, param: str
    ) -> list[Encoding]:
        """Of a text that is too long."""
        text, prompt = _text_and_prompt(item, prompt)
        if len(text) // self.tokenizer.max_piece_chars > MAX_REQUEST_TOKENS:
            raise _too_many_tokens()
        try:
            return self.tokenizer.parts(text, prompt, max_tokens=max_tokens, number=index)
        except EmptyPoolError as error:
            raise InvalidRequestError(f"{error}", param=param) from None
        except UnsupportedError as error:
            raise InvalidRequestError(f"truncate: {error}", param="truncate") from None

    def _spans(
        self, inputs: Sequence[Input], prompt: Prompt, chunks: Chunks, max_tokens: int
    ) -> list[Encoding]:
        """Of the one text that may have them."""
        if len(inputs) != 1 or isinstance(inputs[0], list):
            raise InvalidRequestError("chunks: they are of one text: send one", param="chunks")
        text, prompt = _text_and_prompt(inputs[0], prompt)
        if len(text) > self.tokenizer.max_piece_chars * max_tokens:
            raise _too_long(None, max_tokens, "input")
        try:
            encodings = self.tokenizer.spans(text, prompt, chunks, max_tokens=max_tokens)
        except InputTooLongError as error:
            raise _too_long(error.num_tokens, error.max_tokens, "input") from None
        except UnsupportedError as error:
            raise InvalidRequestError(f"chunks: {error}", param="chunks") from None
        except ChunksError as error:
            param = "chunks" if error.index is None else f"chunks[{error.index}]"
            raise InvalidRequestError(f"{param}: {error}", param=param) from None
        if len(encodings) > MAX_REQUEST_INPUTS:
            raise InvalidRequestError(
                f"chunks: {len(encodings)} vectors, the limit is {MAX_REQUEST_INPUTS}",
                param="chunks",
            )
        return encodings

    def _encoded(
        self,
        texts: Sequence[str],
        prompt: Prompt,
        max_tokens: int,
        truncate: Truncation,
        abandoned: Callable[[], bool],
    ) -> Iterator[Encoding | ModelError]:
        """Some texts at a time, so that the work ends early when it can."""
        first = chars = 0
        around = prompt.num_chars
        for last, text in enumerate(texts):
            chars += around + len(text)
            few = chars < _CHARS_AT_ONCE and last + 1 - first < _TEXTS_AT_ONCE
            if few and last + 1 < len(texts):
                continue
            if abandoned():
                raise AbandonedError
            yield from self.tokenizer.encode_batch(
                texts[first : last + 1], prompt, max_tokens=max_tokens, truncate=truncate
            )
            first, chars = last + 1, 0

    def _refuse_if_hopeless(self, texts: Sequence[str], prompt: Prompt, max_tokens: int) -> None:
        """Before tokenizing: a piece has only so many characters."""
        chars, longest = prompt.num_chars, self.tokenizer.max_piece_chars
        examples = num_chars(prompt.examples) if prompt.examples else 0
        if examples > longest * self.max_input_tokens:
            raise ContextLengthExceededError(
                f"the examples alone have more than {self.max_input_tokens} tokens",
                param="examples",
            )
        if chars - examples > longest * max_tokens:
            raise ContextLengthExceededError(
                f"the instruction alone has more than {max_tokens} tokens, the limit of one input",
                param="prompt",
            )
        least = (min((chars + len(text)) // longest, max_tokens) for text in texts)
        if sum(least) > MAX_REQUEST_TOKENS:
            raise _too_many_tokens()

    @staticmethod
    def _checked(result: Encoding | ModelError, param: str) -> Encoding:
        if isinstance(result, InputTooLongError):
            raise _too_long(result.num_tokens, result.max_tokens, param)
        if isinstance(result, EmptyPoolError):
            raise InvalidRequestError(f"{result}", param=param)
        assert isinstance(result, Encoding), result
        return result

    def _from_ids(
        self, ids: list[int], param: str, max_tokens: int, truncate: Truncation
    ) -> Encoding:
        """Check ids and use them verbatim. Foreign ids (tiktoken's) mean other words here."""
        vocabulary = self.tokenizer.vocab_size
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InvalidRequestError(
                f"token ids must lie between 0 and {vocabulary - 1}. {_FOREIGN_IDS}", param=param
            )
        ends = self.tokenizer.family.keeps_eos is not None
        whole = not ends or len(ids) == self.max_input_tokens or ids[-1] == EOS_ID
        if len(ids) < 1 + ends or ids[0] != BOS_ID or BOS_ID in ids[1:] or not whole:
            raise InvalidRequestError(
                f"token ids must start with BOS ({BOS_ID}), hold no other BOS"
                + (f", and end with EOS ({EOS_ID})" if ends else "")
                + f". {_FOREIGN_IDS}",
                param=param,
            )
        try:
            return self.tokenizer.to_encoding(ids, max_tokens, truncate)
        except InputTooLongError as error:
            raise _too_long(error.num_tokens, error.max_tokens, param) from None


def _text_and_prompt(item: Input, prompt: Prompt) -> tuple[str, Prompt]:
    """prompt: of texts that bring none."""
    assert not isinstance(item, list), "ids are no text"
    return (item, prompt) if isinstance(item, str) else (item.text, item.prompt)


_FOREIGN_IDS = (
    "These look like ids of another tokenizer: send text instead (LangChain's OpenAIEmbeddings: "
    "check_embedding_ctx_length=False), or ids from POST /tokenize"
)


def _too_long(num_tokens: int | None, max_tokens: int, param: str) -> ContextLengthExceededError:
    shown = f"more than {max_tokens}" if num_tokens is None else f"{num_tokens}"
    return ContextLengthExceededError(
        f"This model's maximum context length is {max_tokens} tokens, however you requested "
        f'{shown} tokens ({param}). Shorten the input or send truncate: "END".',
        param=param,
    )


def _too_many_tokens() -> InvalidRequestError:
    return InvalidRequestError(
        f"the inputs have more than {MAX_REQUEST_TOKENS} tokens together, the limit of one "
        "request: send fewer inputs at once",
        param="input",
    )
