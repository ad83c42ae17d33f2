"""What every dialect's bodies have in common: null means absent, and one field has one value.

Knows no field.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    AfterValidator,
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


def truncation_or_average(value: object) -> Truncation | Literal["average"] | None:
    named = truncation(value)
    if named is None or named == "average":
        return named
    try:
        return Truncation(named)  # type: ignore[arg-type]
    except ValueError:
        raise PydanticCustomError(
            "truncate", "Input should be 'none', 'end', 'start' or 'average'"
        ) from None


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


@dataclass(frozen=True)
class OtherNames:
    """In an Annotated field: what else it is called in a body. Resolved here, for pydantic would
    look for each of a field's names in every body."""

    names: tuple[str, ...]


def or_named(*names: str) -> OtherNames:
    return OtherNames(names)


class Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_value_each(cls, body: object) -> object:
        """A null in one of a field's names must not hide another, nor one value another."""
        if not isinstance(body, dict):
            return body
        found = cls._unfolded({k: value for k, value in body.items() if value is not None})
        others = cls.other_names()
        if others.keys().isdisjoint(found):
            return found
        named: dict[str, Any] = {}
        first: dict[str, str] = {}
        for name, value in found.items():
            field = others.get(name, name)
            if named.setdefault(field, value) != value:
                raise InvalidRequestError(
                    f"{name} and {first[field]} are one field here, and their values differ",
                    param=name,
                )
            first.setdefault(field, name)
        return named

    @classmethod
    def name_in(cls, body: dict[str, Any], field: str) -> str:
        """Which of its names a field has in a body that has been read."""
        found, others = cls._unfolded(body), cls.other_names()
        return next((name for name in found if others.get(name, name) == field), field)

    @classmethod
    def _unfolded(cls, body: dict[str, Any]) -> dict[str, Any]:
        """In the fields' own form, and without those that nobody can honour."""
        return body

    @classmethod
    @functools.cache
    def all_names(cls) -> frozenset[str]:
        """Of its fields, in a body."""
        return frozenset([*cls.model_fields, *cls.other_names()])

    @classmethod
    @functools.cache
    def other_names(cls) -> dict[str, str]:
        """Name in a body -> the field that has another one."""
        return {
            name: field_name
            for field_name, field in cls.model_fields.items()
            for also in field.metadata
            if isinstance(also, OtherNames)
            for name in also.names
        }
