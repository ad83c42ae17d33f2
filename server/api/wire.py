"""What every dialect's bodies have in common: null means absent, and one field has one value.

Knows no field.
"""

from __future__ import annotations

import functools
from typing import Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.tokenizer import Truncation
from server.errors import InvalidRequestError


def truncation(value: object) -> object:
    if isinstance(value, bool):
        return Truncation.END if value else Truncation.NONE
    named = lower(value)
    return _SIDES_CUT.get(named, named) if isinstance(named, str) else named


def lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


_SIDES_CUT = {"right": Truncation.END, "left": Truncation.START}


def must_be(right: bool) -> Any:
    """A boolean that has one value here."""

    def check(value: bool | None) -> bool | None:
        if value is (not right):
            raise PydanticCustomError(
                "literal_error", "Input should be {right}", {"right": str(right).lower()}
            )
        return value

    return (
        AfterValidator(check),
        WithJsonSchema({"anyOf": [{"const": right, "type": "boolean"}, {"type": "null"}]}),
    )


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_value_each(cls, body: object) -> object:
        """Before names are matched: a null in one of a field's names must not hide another, nor one
        value another."""
        if not isinstance(body, dict):
            return body
        found = cls._unfolded({k: value for k, value in body.items() if value is not None})
        twice: dict[str, str] = {}
        others = cls.other_names()
        for name in found:
            field = others.get(name)
            if field is None:
                continue
            first = twice.setdefault(field, name)
            if first != name and found[first] != found[name]:
                raise InvalidRequestError(
                    f"{name} and {first} are one field here, and their values differ", param=name
                )
        return found

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        """In the fields' own form, and without those that nobody can honour."""
        return body

    @classmethod
    @functools.cache
    def all_names(cls) -> frozenset[str]:
        """Of its fields, in a body."""
        several = cls.other_names()
        return frozenset([*several, *(cls.model_fields.keys() - set(several.values()))])

    @classmethod
    @functools.cache
    def other_names(cls) -> dict[str, str]:
        """Of the fields that have several: name -> field."""
        return {
            str(choice): name
            for name, field in cls.model_fields.items()
            if isinstance(field.validation_alias, AliasChoices)
            for choice in field.validation_alias.choices
        }
