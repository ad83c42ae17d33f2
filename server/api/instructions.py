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


class Chosen(NamedTuple):
    """What stands around a request's texts (None when nobody says), and which side they are."""

    prompt: Prompt | None
    side: Side | None = None


def choose_prompt(
    defaults: Defaults,
    asked: InstructedInput | PromptFields,
    model_side: Side | None = None,
    path_side: Side | None = None,
) -> Chosen:
    """What stands around a request's texts.

    The first that is given decides: prompt and suffix (verbatim), instruction, task, the path
    (`path_side`), input_type, the model's name (`model_side`), the server's default. "" in one of
    them means explicitly none. Raises InvalidRequestError for unknown names, listing the known
    ones, and for what this model has no place for.
    """
    try:
        return _chosen(defaults, asked, model_side, path_side)
    except PromptError as error:
        raise InvalidRequestError(f"{error}", param=error.field) from None


def _chosen(
    defaults: Defaults,
    asked: InstructedInput | PromptFields,
    model_side: Side | None,
    path_side: Side | None,
) -> Chosen:
    family = defaults.family
    examples: list[Example] = []
    if asked.examples:
        examples = [Example(e.instruction, e.query, e.response) for e in asked.examples]
    input_type = asked.input_type if path_side is None else path_side
    named = _named(input_type, defaults) if input_type else None
    side = model_side if named is None else named.side
    if asked.prompt is not None or asked.suffix is not None:
        if examples:
            raise PromptError("examples", "examples and a verbatim prompt: write them into it")
        return Chosen(family.verbatim(asked.prompt or "", asked.suffix or ""), side)
    if named is not None and named.prompt is not None:
        return named
    if asked.instruction is not None:
        side = side or "query"
        return Chosen(family.prompt(side, asked.instruction, examples), side)
    if asked.task:
        return _of_task(asked.task, side or "query", defaults, examples)
    if asked.task is not None or input_type == "":
        if examples:
            raise PromptError("examples", "examples, and nothing around the texts: which is it?")
        return Chosen(NO_PROMPT)
    side = side or defaults.input_type or ("query" if examples else None)
    return Chosen(None if side is None else defaults.prompt(side, examples), side)


def _named(name: str, defaults: Defaults) -> Chosen:
    """A side, or a prompt: of the model's own files, or of a query without a description."""
    if name in defaults.prompts and name not in INPUT_TYPES:
        return Chosen(_own(name, defaults))
    if name.lower() in INPUT_TYPES:
        side = INPUT_TYPES[name.lower()]
        if side is None:
            return Chosen(defaults.family.prompt("query"), "query")
        return Chosen(None, side)
    known = ", ".join([*INPUT_TYPES, *defaults.prompts])
    raise InvalidRequestError(
        f"unknown input_type {_shown(name)}; known: {known}", param="input_type"
    )


def _of_task(name: str, side: Side, defaults: Defaults, examples: Sequence[Example]) -> Chosen:
    if name in defaults.prompts and not examples:
        return Chosen(_own(name, defaults))
    if (input_type := _OTHER_TASKS.get(name)) is not None:
        named = _named(input_type, defaults)
        if named.prompt is not None or named.side is None:
            return named
        return Chosen(defaults.prompt(named.side, examples), named.side)
    task = find_task("STS" if name == "text-matching" else name)
    if task is None:
        known = ", ".join([*defaults.prompts, *TASKS])
        raise InvalidRequestError(
            f"unknown task {_shown(name)}; known: {known} (GET /v1/instructions)", param="task"
        )
    if defaults.family.template is None:
        raise defaults.family.only_takes_a_side("task")
    described = task.query if side == "query" else task.passage
    return Chosen(defaults.family.prompt(side, described, examples), side)


def _own(name: str, defaults: Defaults) -> Prompt:
    return defaults.family.verbatim(defaults.prompts[name], defaults.family.suffix)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")
