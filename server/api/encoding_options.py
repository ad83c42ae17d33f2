"""The fields of a request that say how its inputs become Encodings, for every dialect."""

from __future__ import annotations

from model.tokenizer import Truncation
from server.api.instructions import Defaults, choose_prompt
from server.api.names import ServedNames
from server.api.schemas import InstructedInput
from server.engine.interface import EncodingOptions
from server.errors import InvalidRequestError


def encoding_options(
    wire: InstructedInput, model: str | None, names: ServedNames, defaults: Defaults
) -> EncodingOptions:
    """What the fields of a request ask for. Raises InvalidRequestError, ModelNotFoundError."""
    side = names.side(model) if model is not None else None
    prompt = choose_prompt(defaults, wire, side)
    is_default = prompt is None
    if prompt is None:  # a model that writes something around passages takes nothing else bare
        prompt = defaults.bare
    if (tokens := wire.truncate_prompt_tokens) is not None:
        if tokens in (0, 1):
            raise InvalidRequestError(
                "truncate_prompt_tokens must be -1, or 2 or more: BOS and EOS are two",
                param="truncate_prompt_tokens",
            )
        return EncodingOptions(prompt, Truncation.START, None if tokens < 0 else tokens, is_default)
    return EncodingOptions(prompt, wire.truncate, is_default=is_default)
