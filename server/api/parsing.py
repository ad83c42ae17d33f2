"""JSON bytes into wire types, and `input` into inputs. Every refusal names the field."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError

from server.api import json_fields, schemas
from server.api.json_text import JSONTextError, loads
from server.api.schemas import EmbeddingsRequest
from server.api.wire import Wire
from server.engine.interface import Input
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_INPUTS

WireT = TypeVar("WireT", bound=Wire)
_UNUSED = frozenset({"user"})
"""Known, and ignored whatever they are."""


def read_body(
    wire: type[WireT], body: bytes | bytearray, between: Callable[[], None] = lambda: None
) -> tuple[WireT, list[str]]:
    """JSON bytes as `wire`, and the names of the fields that nobody knows. between: called after
    each so many bytes of a large body.

    Raises InvalidRequestError.
    """
    known = known_fields(wire)
    try:
        if len(body) <= json_fields.STEP:
            fields = loads(body)
            if not isinstance(fields, dict):
                raise InvalidRequestError("The body must be a JSON object")
            unknown = [] if known.issuperset(fields) else [n for n in fields if n not in known]
        else:
            fields, others = json_fields.read_fields(body, known - _UNUSED, between=between)
            unknown = [name for name in others if name not in known]
    except JSONTextError as error:
        raise InvalidRequestError(f"The body is not valid JSON: {error}") from None
    return parse_fields(wire, fields), unknown


def parse_fields(wire: type[WireT], fields: dict[str, Any]) -> WireT:
    """What a JSON object holds as `wire`. Raises InvalidRequestError naming the field."""
    try:
        return wire.model_validate(fields)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    first, *inside = problem["loc"]
    sent = wire.name_in({k: v for k, v in fields.items() if v is not None}, str(first))
    name = "".join([sent, *(f"[{x}]" if isinstance(x, int) else f".{x}" for x in inside)])
    if problem["type"] == "missing":
        raise InvalidRequestError(f"you must provide the field '{name}'", param=name)
    if problem["type"] == "literal_error" and (field := wire.model_fields.get(str(first))):
        raise InvalidRequestError(f"{name}: {problem['msg']}. {field.description}", param=name)
    what = "an object is needed" if problem["type"] == "model_type" else problem["msg"]
    raise InvalidRequestError(f"{name}: {what}", param=name)


@functools.cache
def known_fields(wire: type[Wire]) -> frozenset[str]:
    """All names that a body may have, aliases included."""
    known = wire.all_names() | EmbeddingsRequest.all_names()
    return frozenset(known | schemas.REFUSED.keys() | schemas.UNFOLDED)


def parse_inputs(value: object, name: str = "input") -> list[Input]:
    """The `input` of a request, in all its forms, as a list of inputs. name: of that field."""
    types: set[type] = set()
    if isinstance(value, list):
        types = set(map(type, value))
        if dict in types:
            value = [_text_of(item) for item in value]
            types = set(map(type, value))
    if isinstance(value, str) or types == {int}:
        types = {type(value)}
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequestError(
            f"{name} must be a string, a list of strings, token ids, or a list of lists of token "
            "ids, and not empty",
            param=name,
        )
    if len(value) > MAX_REQUEST_INPUTS:
        raise InvalidRequestError(
            f"{name} has {len(value)} items, the limit is {MAX_REQUEST_INPUTS}", param=name
        )
    if len(types) > 1:
        raise InvalidRequestError(
            f"{name} must not mix texts, token ids and other values", param=name
        )
    for index, item in enumerate(value):
        if problem := _item_problem(item):
            param = name if len(value) == 1 else f"{name}[{index}]"
            raise InvalidRequestError(f"{param} {problem}", param=param)
    return value


def _text_of(item: object) -> object:
    """Of Jina's form of an input; whatever else it is, as it is."""
    if isinstance(item, dict) and item.keys() == {"text"} and isinstance(item["text"], str):
        return item["text"]
    return item


def _item_problem(item: object) -> str | None:
    if isinstance(item, str):
        return None if item else "is an empty string: send a text"
    if not isinstance(item, list):
        return "must be a string or a list of token ids"
    if not item:
        return "is an empty list: send token ids"
    return None if set(map(type, item)) == {int} else "must hold token ids, which are integers"
