"""How a request's fields choose what stands around its texts. The named tasks: model/tasks.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from model.errors import PromptError
from model.families import NV_EMBED, Family, Side
from model.prompts import NO_PROMPT, Example, Prompt
from model.tasks import TASKS, find_task
from server.api.schemas import InstructedInput
from server.errors import InvalidRequestError

INPUT_TYPES: dict[str, Side | None] = {
    "query": "query",
    "search_query": "query",
    "passage": "passage",
    "document": "passage",
    "search_document": "passage",
    "classification": None,
    "clustering": None,
}
"""None: every text is a query, and nothing describes its task."""
_OTHER_TASKS = {
    "retrieval.query": "query",
    "retrieval.passage": "passage",
    "classification": "classification",
    "separation": "clustering",
}
"""Jina's names of tasks, as input types."""


@dataclass(frozen=True)
class Defaults:
    """What model and settings say about inputs whose request does not."""

    query_instruction: str
    input_type: Side | None = None
    family: Family = NV_EMBED
    """Of the model that is served: what it writes around a text of either side."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> prefix, of the model's own files."""

    @classmethod
    def of(
        cls,
        query_instruction: str,
        input_type: Literal["none", "query", "passage"],
        family: Family = NV_EMBED,
        prompts: Mapping[str, str] | None = None,
    ) -> Defaults:
        task = find_task(query_instruction)
        return cls(
            task.query if task else query_instruction,
            None if input_type == "none" else input_type,
            family,
            prompts or {},
        )

    @functools.cached_property
    def bare(self) -> Prompt:
        """Around a text of which nobody says anything, not even the side."""
        return self.prompt("passage")

    def prompt(self, side: Side, examples: Sequence[Example] = ()) -> Prompt:
        """Around a text whose task nobody describes."""
        described = side == "query" and self.family.template is not None
        return self.family.prompt(side, self.query_instruction if described else "", examples)


class PromptFields(NamedTuple):
    """What a command says about what stands around its texts, as a request's fields do."""

    prompt: str | None = None
    suffix: str | None = None
    instruction: str | None = None
    task: str | None = None
    input_type: str | None = None
    examples: Sequence[Example] = ()


def choose_prompt(
    defaults: Defaults, asked: InstructedInput | PromptFields, model_side: Side | None = None
) -> Prompt | None:
    """What stands around a request's texts; None when no field says, and the side neither.

    The first that is given decides: prompt and suffix (verbatim), instruction, task, input_type,
    the model's name (`model_side`), the server's default. "" in one of them means explicitly none.
    Raises InvalidRequestError for unknown names, listing the known ones, and for what this model
    has no place for.
    """
    try:
        return _chosen(defaults, asked, model_side)
    except PromptError as error:
        raise InvalidRequestError(f"{error}", param=error.field) from None


def _chosen(
    defaults: Defaults, asked: InstructedInput | PromptFields, model_side: Side | None
) -> Prompt | None:
    family = defaults.family
    examples: list[Example] = []
    if asked.examples:
        examples = [Example(e.instruction, e.query, e.response) for e in asked.examples]
    named = _named(asked.input_type, defaults) if asked.input_type else None
    if asked.prompt is not None or asked.suffix is not None:
        if examples:
            raise PromptError("examples", "examples and a verbatim prompt: write them into it")
        return family.verbatim(asked.prompt or "", asked.suffix or "")
    if isinstance(named, Prompt):
        return named
    side = named or model_side
    if asked.instruction is not None:
        return family.prompt(side or "query", asked.instruction, examples)
    if asked.task:
        return _of_task(asked.task, side or "query", defaults, examples)
    if asked.task is not None or asked.input_type == "":
        if examples:
            raise PromptError("examples", "examples, and nothing around the texts: which is it?")
        return NO_PROMPT
    side = side or defaults.input_type
    if examples:
        return defaults.prompt(side or "query", examples)
    return None if side is None else defaults.prompt(side)


def _named(name: str, defaults: Defaults) -> Side | Prompt:
    """A side, or a prompt of the model's own files."""
    if name in defaults.prompts and name not in INPUT_TYPES:
        return _own(name, defaults)
    if name.lower() in INPUT_TYPES:
        return INPUT_TYPES[name.lower()] or defaults.family.prompt("query")
    known = ", ".join([*INPUT_TYPES, *defaults.prompts])
    raise InvalidRequestError(
        f"unknown input_type {_shown(name)}; known: {known}", param="input_type"
    )


def _of_task(name: str, side: Side, defaults: Defaults, examples: Sequence[Example]) -> Prompt:
    if name in defaults.prompts and not examples:
        return _own(name, defaults)
    if (input_type := _OTHER_TASKS.get(name)) is not None:
        named = _named(input_type, defaults)
        return named if isinstance(named, Prompt) else defaults.prompt(named, examples)
    task = find_task("STS" if name == "text-matching" else name)
    if task is None:
        known = ", ".join([*defaults.prompts, *TASKS])
        raise InvalidRequestError(
            f"unknown task {_shown(name)}; known: {known} (GET /v1/instructions)", param="task"
        )
    if defaults.family.template is None:
        raise defaults.family.only_takes_a_side("task")
    return defaults.family.prompt(side, task.query if side == "query" else task.passage, examples)


def _own(name: str, defaults: Defaults) -> Prompt:
    return defaults.family.verbatim(defaults.prompts[name], defaults.family.suffix)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")
