"""The field `chunks`: what it may be, and what an answer says of each. See model.chunks."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticCustomError

from model.batch import Span
from model.chunks import Chunks, Run
from server.settings import MAX_REQUEST_INPUTS

_RUNS: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_REQUEST_INPUTS,
    "items": {
        "type": "array",
        "items": {"type": "integer", "minimum": 0},
        "minItems": 2,
        "maxItems": 2,
    },
}
_UNITS = ("characters", "tokens")
CHUNKS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        _RUNS,
        *(
            {
                "type": "object",
                "properties": {unit: _RUNS},
                "required": [unit],
                "additionalProperties": False,
            }
            for unit in _UNITS
        ),
        {"type": "null"},
    ]
}


def chunks_of(value: object) -> Chunks | None:
    """Raises PydanticCustomError."""
    if value is None:
        return None
    if type(value) is int and value > 0:
        return Chunks("size", size=value)
    if isinstance(value, list):
        return Chunks("characters", runs=_runs(value))
    if isinstance(value, dict) and len(value) == 1:
        ((unit, runs),) = value.items()
        if unit == "characters":
            return Chunks("characters", runs=_runs(runs))
        if unit == "tokens":
            return Chunks("tokens", runs=_runs(runs))
    raise _wrong(
        "a number of tokens, a list of [first, end] in characters, or an object with one of "
        f"{' and '.join(_UNITS)} is needed"
    )


def _runs(value: object) -> tuple[Run, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_REQUEST_INPUTS:
        raise _wrong(f"1 to {MAX_REQUEST_INPUTS} runs [first, end] are needed")
    for index, run in enumerate(value):
        if not isinstance(run, list) or list(map(type, run)) != [int, int] or run[0] >= run[1]:
            raise _wrong(f"run {index} must be [first, end], two numbers, the first the smaller")
    return tuple((first, end) for first, end in value)


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("chunks", "{problem}", {"problem": message})


def said_of(span: Span) -> dict[str, list[int]]:
    """In an answer, beside the vector."""
    return {"characters": list(span.characters), "tokens": list(span.tokens)}
