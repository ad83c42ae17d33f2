"""How a request's fields choose one prefix. The named tasks themselves: model/tasks.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.families import NV_EMBED, Family
from model.tasks import TASKS, find_task, prefix_of
from server.errors import InvalidRequestError

Side = Literal["query", "passage"]

INPUT_TYPES: dict[str, Side] = {
    "query": "query",
    "search_query": "query",
    "passage": "passage",
    "document": "passage",
    "search_document": "passage",
}


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the server's settings say about inputs whose request does not."""

    query_instruction: str
    input_type: Side | None = None
    family: Family = NV_EMBED
    """Of the model that is served: how a task description is written before a text."""

    @classmethod
    def of(
        cls,
        query_instruction: str,
        input_type: Literal["none", "query", "passage"],
        family: Family = NV_EMBED,
    ) -> Defaults:
        task = find_task(query_instruction)
        return cls(
            task.query if task else query_instruction,
            None if input_type == "none" else input_type,
            family,
        )


def choose_prefix(
    defaults: Defaults,
    *,
    prompt: str | None = None,
    instruction: str | None = None,
    task: str | None = None,
    input_type: str | None = None,
    model_side: Side | None = None,
) -> str | None:
    """The verbatim prefix of a request's inputs; None when no field asks for one.

    The first that is given decides: prompt, instruction, task, input_type, the model's suffix
    (`model_side`), the server's default. "" in one of them means explicitly none.
    Raises InvalidRequestError for unknown names, listing the known ones.
    """
    side = _side(input_type) if input_type else None
    if prompt is not None:
        return prompt
    if instruction is not None:
        return prefix_of(instruction, defaults.family)
    if task is not None:
        side = side or model_side or "query"
        return _task_prefix(task, side, defaults.family) if task else ""
    if input_type == "":
        return ""
    side = side or model_side or defaults.input_type
    if side is None:
        return None
    return prefix_of(defaults.query_instruction, defaults.family) if side == "query" else ""


def _side(input_type: str) -> Side:
    side = INPUT_TYPES.get(input_type)
    if side is None:
        known = ", ".join(INPUT_TYPES)
        raise InvalidRequestError(
            f"unknown input_type {_shown(input_type)}; known: {known}", param="input_type"
        )
    return side


def _task_prefix(name: str, side: Side, family: Family) -> str:
    task = find_task(name)
    if task is None:
        raise InvalidRequestError(
            f"unknown task {_shown(name)}; known: {', '.join(TASKS)} (GET /v1/instructions)",
            param="task",
        )
    return prefix_of(task.query if side == "query" else task.passage, family)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")
