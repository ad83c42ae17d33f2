"""Synthetic training examples from a chat model's answers: what is still to be asked, what an
answer holds, what is a repetition.

All of it is a function of the settings and of the answers that there are, in whatever order they
came: a run that was killed goes on from its answers alone. Knows no server and no file.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from model.training.chat import Answer
from model.training.examples import Example
from model.training.synthesis_prompts import (
    KINDS,
    MOST_TASK_CHARS,
    TASKS_AT_ONCE,
    digest,
    example_prompt,
    tasks_prompt,
)

MOST_CHARS = 20_000
"""Of one text: a model that does not stop has lost its thread."""
_MOST_NEGATIVES = 16
_PLACES = 20
"""Where in an answer JSON may begin, at most: prose is not searched for ever."""
_REFUSAL = re.compile(r"(?i)\W*(i'?m sorry|i am sorry|sorry|i can(no|')?t\b|as an ai\b)")


class MalformedError(Exception):
    """An answer holds no example; its text is the reason, in a word or two."""


@dataclass(frozen=True, slots=True)
class SynthesisSettings:
    """All that decides what is asked for. A run goes on only with the same."""

    model: str
    kinds: tuple[str, ...]
    tasks: int  # of each kind
    examples_per_task: int
    languages: tuple[str, ...]
    temperature: float
    max_retries: int  # of a malformed answer
    seed: int
    prompts: str = field(default_factory=digest)

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Request:
    id: str
    prompt: str


@dataclass(slots=True)
class Found:
    """What the answers come to."""

    examples: dict[str, list[Example]]  # by kind
    tasks: dict[str, int]
    counts: Counter[str]  # duplicate_tasks, duplicate_queries, given_up
    malformed: Counter[str]  # by reason


def pending(settings: SynthesisSettings, answers: Mapping[str, Answer]) -> list[Request]:
    """What is to be asked next; empty when all is there. Tasks come first: the rest needs them."""
    readings = [_tasks(settings, kind, answers) for kind in settings.kinds]
    if requests := [request for reading in readings for request in reading.missing]:
        return requests
    return [
        missing
        for kind, reading in zip(settings.kinds, readings, strict=True)
        for slot in _slots(settings, kind, reading.tasks)
        if (missing := slot.read(answers).missing)
    ]


def found(settings: SynthesisSettings, answers: Mapping[str, Answer]) -> Found:
    """The examples, in the order of what was asked, each query once."""
    result = Found({}, {}, Counter(), Counter())
    seen: set[str] = set()
    for kind in settings.kinds:
        reading = _tasks(settings, kind, answers)
        result.tasks[kind] = len(reading.tasks)
        result.counts["duplicate_tasks"] += reading.duplicates
        result.malformed += reading.malformed
        examples = result.examples.setdefault(kind, [])
        for slot in _slots(settings, kind, reading.tasks):
            outcome = slot.read(answers)
            result.malformed += outcome.malformed
            if outcome.example is None:
                result.counts["given_up"] += outcome.missing is None
            elif (query := normalised(outcome.example.query)) in seen:
                result.counts["duplicate_queries"] += 1
            else:
                seen.add(query)
                examples.append(outcome.example)
    return result


@dataclass(slots=True)
class _TaskReading:
    tasks: list[str]
    missing: list[Request]
    duplicates: int
    malformed: Counter[str]


def _tasks(settings: SynthesisSettings, kind: str, answers: Mapping[str, Answer]) -> _TaskReading:
    """The tasks of a kind. Each round asks for as many as are missing after the one before."""
    tasks: dict[str, str] = {}
    duplicates, malformed, asked = 0, Counter[str](), 0
    most = -(-settings.tasks // TASKS_AT_ONCE) * (1 + settings.max_retries)
    while (wanted := settings.tasks - len(tasks)) > 0 and asked < most:
        last = min(asked + -(-wanted // TASKS_AT_ONCE), most)
        requests = [
            Request(f"tasks/{kind}/{number}", tasks_prompt(KINDS[kind], number, settings.seed))
            for number in range(asked, last)
        ]
        if absent := [request for request in requests if request.id not in answers]:
            return _TaskReading(list(tasks.values()), absent, duplicates, malformed)
        for request in requests:
            try:
                said = parse_tasks(answers[request.id])
            except MalformedError as error:
                malformed[str(error)] += 1
                continue
            for task in said:
                duplicates += normalised(task) in tasks
                tasks.setdefault(normalised(task), task)
        asked = last
    return _TaskReading(list(tasks.values())[: settings.tasks], [], duplicates, malformed)


@dataclass(slots=True)
class _Outcome:
    example: Example | None
    missing: Request | None
    malformed: Counter[str]


@dataclass(frozen=True, slots=True)
class _Slot:
    """The place of one example: a task, and the how-manieth example of it."""

    settings: SynthesisSettings
    kind: str
    task: str
    id: str
    index: int

    def read(self, answers: Mapping[str, Answer]) -> _Outcome:
        malformed = Counter[str]()
        for attempt in range(1 + self.settings.max_retries):
            id_ = f"{self.id}/{attempt}"
            if (answer := answers.get(id_)) is None:
                number = self.index + attempt * self.settings.examples_per_task
                languages, seed = self.settings.languages, self.settings.seed
                prompt = example_prompt(KINDS[self.kind], self.task, number, languages, seed)
                return _Outcome(None, Request(id_, prompt), malformed)
            try:
                query, positive, negatives = parse_example(answer)
            except MalformedError as error:
                malformed[str(error)] += 1
                continue
            symmetric = KINDS[self.kind].symmetric
            example = Example(query, positive, negatives, self.task, symmetric)
            return _Outcome(example, None, malformed)
        return _Outcome(None, None, malformed)


def _slots(settings: SynthesisSettings, kind: str, tasks: list[str]) -> Iterator[_Slot]:
    for number, task in enumerate(tasks):
        for index in range(settings.examples_per_task):
            yield _Slot(settings, kind, task, f"{kind}/{number}/{index}", index)


def parse_tasks(answer: Answer) -> list[str]:
    """The tasks of an answer that is an array of sentences. Raises MalformedError."""
    items = _json_in(answer, list)
    texts = [" ".join(item.split()) for item in items if isinstance(item, str) and item.strip()]
    tasks = [text for text in texts if len(text) <= MOST_TASK_CHARS and _is_unicode(text)]
    if not tasks:
        raise MalformedError("too long" if texts else "missing field")
    return tasks


def parse_example(answer: Answer) -> tuple[str, str, tuple[str, ...]]:
    """Query, positive and negatives of an answer. Raises MalformedError."""
    row = _json_in(answer, dict)
    negatives = row.get("negatives")
    if not isinstance(negatives, list) or not 1 <= len(negatives) <= _MOST_NEGATIVES:
        raise MalformedError("missing field")
    texts: list[str] = []
    for value in (row.get("query"), row.get("positive"), *negatives):
        if not isinstance(value, str):
            raise MalformedError("missing field")
        if not value.strip():
            raise MalformedError("empty text")
        if len(value) > MOST_CHARS:
            raise MalformedError("too long")
        if not _is_unicode(value):
            raise MalformedError("not Unicode")
        texts.append(value.strip())
    if len(set(map(normalised, texts))) < len(texts):
        raise MalformedError("equal texts")
    query, positive, *others = texts
    return query, positive, tuple(others)


def normalised(text: str) -> str:
    """What two texts have in common that say the same: no case, punctuation or white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or "".join(folded.split())


def _json_in(answer: Answer, kind: type) -> Any:
    """The first array or object in an answer, whatever stands around it. Raises MalformedError."""
    if answer.finish == "refusal":
        raise MalformedError("refused")
    text = answer.text.rpartition("</think>")[2]  # what a model thought first is no answer
    decoder, place = json.JSONDecoder(), -1
    for _ in range(_PLACES):
        if (place := text.find("[" if kind is list else "{", place + 1)) < 0:
            break
        try:
            value, _ = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, kind):
            return value
    if answer.finish == "length":
        raise MalformedError("cut off")
    if not text.strip():
        raise MalformedError("empty answer")
    raise MalformedError("refused" if _REFUSAL.match(text) else "no JSON")


def _is_unicode(text: str) -> bool:
    """Whether it has no half of a surrogate pair, as of an emoji that was cut."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
