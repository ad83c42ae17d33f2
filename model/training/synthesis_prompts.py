"""What a chat model is asked for synthetic examples, in two steps: for tasks, then for examples.

The steps are those of "Improving Text Embeddings with Large Language Models" (Wang et al. 2024),
which NV-Embed's synthetic data follow; the words are our own. Which topic, length, clarity,
difficulty and language a prompt names is drawn from the seed and from what is asked for, so the
same request is the same prompt in every run. Owns what kinds of example there are. Knows nothing of
answers.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

TASKS_AT_ONCE = 10
"""Tasks of one answer: more repeat one another."""
MOST_TASK_CHARS = 300


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of task: what its tasks are, and what its three texts are."""

    tasks: str
    given: str  # how a task's sentence begins
    query: str
    positive: str
    negatives: str
    query_lengths: tuple[str, ...]
    positive_lengths: tuple[str, ...]
    symmetric: bool = False


KINDS = {
    "short": Kind(
        "retrieval tasks, in which somebody with a short query looks for a longer document",
        "Given a ..., retrieve ...",
        "what somebody types who looks for the document: a question, keywords, a claim or a title, "
        "as the task has it",
        "a document that answers the query well, in the words of its own author, and without "
        "repeating the query",
        "documents that share topic and words with the query and that a hasty reader would take "
        "for answers, but that do not answer it",
        ("fewer than 5 words", "5 to 15 words", "10 to 30 words"),
        ("50 to 100 words", "100 to 200 words", "200 to 300 words"),
    ),
    "long": Kind(
        "classification tasks, in which a longer text gets one label out of several: topic, "
        "intent, sentiment, kind of document, attitude and the like",
        "Classify a given ... by ...",
        "the text to classify, from which the label can be told, though it does not stand there",
        "the text's label, as the task would name it",
        "other labels of the same task that are near the right one and yet wrong for this text",
        ("10 to 30 words", "30 to 100 words", "100 to 200 words"),
        ("1 to 5 words",),
    ),
    "match": Kind(
        "matching tasks, in which two short texts of the same kind belong together: titles, "
        "questions, product names, headlines, remarks and the like",
        "Given a ..., find ...",
        "one short text",
        "another short text that the task would match with it, in other words",
        "short texts that look much like the first one, and that the task would not match with it",
        ("fewer than 5 words", "5 to 15 words"),
        ("fewer than 5 words", "5 to 15 words"),
        symmetric=True,
    ),
}
"""Named by the query: a short one finds a long text, a long one its short label (both are the
paper's, short-long and long-short, and so is its third, short-short)."""

_TOPICS = (
    *("cooking", "medicine", "household repairs", "law and contracts", "public transport"),
    *("programming", "personal finance", "gardening", "school and university", "sport", "history"),
    *("mathematics", "travel", "music", "films and series", "literature", "politics", "energy"),
    *("biology", "chemistry", "physics", "farming", "fashion", "childcare", "pets", "insurance"),
    *("customer service", "job applications", "news", "weather and climate", "religion", "art"),
    *("astronomy", "video games", "housing", "shopping", "languages", "psychology", "security"),
    *("manufacturing", "social media", "local government", "cars", "the sea", "food safety"),
)
_CLARITY = (
    "clear",
    "understandable after some thought",
    "vague, as people write who know what they mean",
)
_DIFFICULTY = ("what a school leaver knows", "what a student knows", "what an expert knows")
NEGATIVES = 2


def digest() -> str:
    """Of everything here that decides a prompt: whether two runs ask for the same."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def tasks_prompt(kind: Kind, number: int, seed: int) -> str:
    """number: how many such requests of this kind were before."""
    rng = random.Random(f"{seed}/tasks/{kind.tasks}/{number}")  # noqa: S311
    topic = rng.choice(_TOPICS)
    return (
        f"List {number + 1}: think of {TASKS_AT_ONCE} {kind.tasks}.\n"
        f"At least half of them should have to do with {topic}; the others may come from anywhere. "
        "They should differ from one another in what is given and in what is wanted.\n"
        f'Write each task as one English sentence of at most 25 words, in the form "{kind.given}", '
        "with no example in it.\n"
        f"Answer with a JSON array of {TASKS_AT_ONCE} strings, and with nothing else."
    )


def example_prompt(
    kind: Kind, task: str, number: int, languages: tuple[str, ...], seed: int
) -> str:
    """number: how many requests for this task were before; languages: one of them is drawn."""
    rng = random.Random(f"{seed}/{task}/{number}")  # noqa: S311
    return (
        f"A text embedding model learns this task: {task}\n\n"
        f"Invent example {number + 1} of it, unlike those that come to mind first, as a JSON "
        "object with three keys:\n"
        f'- "query": {kind.query} ({rng.choice(kind.query_lengths)}; '
        f"{rng.choice(_CLARITY)});\n"
        f'- "positive": {kind.positive} ({rng.choice(kind.positive_lengths)});\n'
        f'- "negatives": a list of {NEGATIVES} strings: {kind.negatives}.\n\n'
        f"All texts are in {rng.choice(languages)}. Understanding them takes "
        f"{rng.choice(_DIFFICULTY)}. Be specific: invent names, numbers and circumstances where "
        "they help, and do not mention the task, this example or yourself.\n"
        "Answer with the JSON object, and with nothing else."
    )
