"""The fields of a request that say how its inputs become Encodings, for every dialect."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from model.families import Family, Side
from model.tokenizer import Truncation
from server.api import parsing
from server.api.detection import WrittenPrompts
from server.api.instructions import Defaults, choose_prompt
from server.api.names import ServedNames
from server.api.schemas import EmbeddingsRequest, InstructedInput
from server.api.token_ids import TokenIds
from server.api.vector_format import VectorFormat
from server.engine.interface import EncodingOptions, Input
from server.errors import InvalidRequestError
from server.settings import EncodeSettings

USUAL_FIELDS = frozenset(
    {
        *("input", "input_type", "token_ids", "add_special_tokens"),
        *(EmbeddingsRequest.model_fields.keys() - InstructedInput.model_fields.keys() - {"chunks"}),
    }
)
"""Of these only `input_type` has to do with how inputs become Encodings."""


def encoding_options(
    wire: InstructedInput,
    model: str | None,
    names: ServedNames,
    defaults: Defaults,
    path_side: Side | None = None,
) -> EncodingOptions:
    """What the fields of a request ask for. Raises InvalidRequestError, ModelNotFoundError."""
    model_side = names.side(model) if model is not None else None
    prompt, side = choose_prompt(defaults, wire, model_side, path_side)
    is_default = prompt is None
    if prompt is None:  # a model that writes something around passages takes nothing else bare
        prompt = defaults.bare
    truncate, most = _truncation(wire)
    averages = wire.truncate == "average"
    chunks = wire.chunks if isinstance(wire, EmbeddingsRequest) else None
    if chunks is not None:
        asked = wire.truncate_prompt_tokens, wire.truncate
        if asked not in ((None, None), (None, Truncation.NONE)):
            raise InvalidRequestError(
                "chunks are of a whole text: leave truncation out", param="chunks"
            )
        truncate = Truncation.NONE
    return EncodingOptions(prompt, truncate, most, averages, chunks, is_default, side)


def _truncation(wire: InstructedInput) -> tuple[Truncation | None, int | None]:
    """What becomes of a too long input, and the request's own limit."""
    if wire.truncate == "average":
        for name in ("truncation_side", "truncate_prompt_tokens"):
            if getattr(wire, name) is not None:
                raise InvalidRequestError(
                    f"{name} says where an input is cut, and truncate: AVERAGE cuts none",
                    param=name,
                )
        return Truncation.NONE, None
    if (tokens := wire.truncate_prompt_tokens) is not None:
        if tokens in (0, 1):
            raise InvalidRequestError(
                "truncate_prompt_tokens must be -1, or 2 or more: BOS and EOS are two",
                param="truncate_prompt_tokens",
            )
        return _cut(wire, Truncation.START), None if tokens < 0 else tokens
    return _cut(wire, wire.truncate), None


def _cut(wire: InstructedInput, asked: Truncation | None) -> Truncation | None:
    """`asked`, at the side that `truncation_side` names."""
    side = wire.truncation_side
    if side is None:
        return asked
    if asked is None:
        raise InvalidRequestError(
            "truncation_side says where an input is cut, and nothing that it is: send "
            "truncate: true, too",
            param="truncation_side",
        )
    if asked is Truncation.NONE:
        return asked
    return Truncation.END if side == "right" else Truncation.START


@dataclass(frozen=True, slots=True)
class Reading:
    """How a server or a run takes its inputs."""

    token_ids: TokenIds
    written: WrittenPrompts | None

    @classmethod
    def of(cls, settings: EncodeSettings | argparse.Namespace, family: Family) -> Reading:
        """Raises SettingsError."""
        return cls(
            TokenIds(settings.token_ids, settings.tiktoken_ranks),
            WrittenPrompts(family) if settings.detect_instructions else None,
        )


def inputs_of(
    wire: InstructedInput, side: Side | None, reading: Reading, name: str = "input"
) -> tuple[Sequence[Input], int]:
    """Its `input`; a text with a prompt written before it as such (and how many there are), where
    the request itself does not say what stands around its texts. Raises InvalidRequestError."""
    parsed = parsing.parse_inputs(wire.input, name)
    inputs = reading.token_ids.read(parsed, wire.token_ids, name)
    written = reading.written
    asked = (wire.prompt, wire.suffix, wire.instruction, wire.task, wire.examples)
    if written is None or side == "passage" or asked != _NOTHING:
        return inputs, 0
    return written.split(inputs)


_NOTHING = (None,) * 5


def vector_format(wire: EmbeddingsRequest) -> VectorFormat:
    """How the answer holds its vectors."""
    base64, big_endian = wire.encoding_format == "base64", wire.endianness == "big"
    return _format(wire.output_dtype or "float32", base64, big_endian, wire.dimensions)


_format = functools.lru_cache(maxsize=64)(VectorFormat)
"""Most requests of a client ask for the same, and a frozen object takes long to make."""
