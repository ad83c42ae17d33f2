"""Named tasks -> instruction text, and how a request's fields choose one prefix.

The authors publish instructions for retrieval, STS and summaries with NV-Embed-v2; those for
classification and clustering are the prompts that MTEB publishes. Both are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.tokenizer import query_prefix
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
class Task:
    """Instruction texts of one task; an empty one means no prefix on that side."""

    query: str
    passage: str = ""
    source: Literal["nv-embed", "mteb"] = "nv-embed"


def _both(text: str) -> Task:
    return Task(text, text)


def _mteb(text: str) -> Task:
    return Task(text, text, "mteb")


_ANSWERS = "Given a question, retrieve passages that answer the question"
_CLAIM = "Given a claim, retrieve documents that support or refute the claim"
_SAME_QUESTION = (
    "Given a question, retrieve questions that are semantically equivalent to the given question"
)

TASKS: dict[str, Task] = {
    "ClimateFEVER": Task(
        "Given a claim about climate change, retrieve documents that support or refute the claim"
    ),
    "HotpotQA": Task(
        "Given a multi-hop question, retrieve documents that can help answer the question"
    ),
    "FEVER": Task(_CLAIM),
    "MSMARCO": Task("Given a web search query, retrieve relevant passages that answer the query"),
    "DBPedia": Task("Given a query, retrieve relevant entity descriptions from DBPedia"),
    "NQ": Task(_ANSWERS),
    "QuoraRetrieval": _both(_SAME_QUESTION),
    "SCIDOCS": Task(
        "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper"
    ),
    "TRECCOVID": Task("Given a query on COVID-19, retrieve documents that answer the query"),
    "Touche2020": Task(_ANSWERS),
    "SciFact": Task(
        "Given a scientific claim, retrieve documents that support or refute the claim"
    ),
    "NFCorpus": Task("Given a question, retrieve relevant documents that answer the question"),
    "ArguAna": Task(_CLAIM),
    "FiQA2018": Task(
        "Given a financial question, retrieve relevant passages that answer the query"
    ),
    "STS": _both("Retrieve semantically similar text"),
    "SUMM": _both("Given a news summary, retrieve other semantically similar summaries"),
    # MTEB's, from mteb 2.26 (Apache-2.0), word for word; the same on both sides.
    "AmazonCounterfactualClassification": _mteb(
        "Classify a given Amazon customer review text as either counterfactual or not-"
        "counterfactual"
    ),
    "AmazonPolarityClassification": _mteb(
        "Classify Amazon reviews into positive or negative sentiment"
    ),
    "AmazonReviewsClassification": _mteb(
        "Classify the given Amazon review into its appropriate rating category"
    ),
    "Banking77Classification": _mteb(
        "Given a online banking query, find the corresponding intents"
    ),
    "EmotionClassification": _mteb(
        "Classify the emotion expressed in the given Twitter message into one of the six "
        "emotions: anger, fear, joy, love, sadness, and surprise"
    ),
    "ImdbClassification": _mteb(
        "Classify the sentiment expressed in the given movie review text from the IMDB dataset"
    ),
    "MTOPDomainClassification": _mteb(
        "Classify the intent domain of the given utterance in task-oriented conversation"
    ),
    "MTOPIntentClassification": _mteb(
        "Classify the intent of the given utterance in task-oriented conversation"
    ),
    "MassiveIntentClassification": _mteb("Given a user utterance as query, find the user intents"),
    "MassiveScenarioClassification": _mteb(
        "Given a user utterance as query, find the user scenarios"
    ),
    "ToxicConversationsClassification": _mteb(
        "Classify the given comments as either toxic or not toxic"
    ),
    "TweetSentimentExtractionClassification": _mteb(
        "Classify the sentiment of a given tweet as either positive, negative, or neutral"
    ),
    "ArxivClusteringP2P": _mteb(
        "Identify the main and secondary category of Arxiv papers based on the titles and abstracts"
    ),
    "ArxivClusteringS2S": _mteb(
        "Identify the main and secondary category of Arxiv papers based on the titles"
    ),
    "BiorxivClusteringP2P": _mteb(
        "Identify the main category of Biorxiv papers based on the titles and abstracts"
    ),
    "BiorxivClusteringS2S": _mteb(
        "Identify the main category of Biorxiv papers based on the titles"
    ),
    "MedrxivClusteringP2P": _mteb(
        "Identify the main category of Medrxiv papers based on the titles and abstracts"
    ),
    "MedrxivClusteringS2S": _mteb(
        "Identify the main category of Medrxiv papers based on the titles"
    ),
    "RedditClustering": _mteb("Identify the topic or theme of Reddit posts based on the titles"),
    "RedditClusteringP2P": _mteb(
        "Identify the topic or theme of Reddit posts based on the titles and posts"
    ),
    "StackExchangeClustering": _mteb(
        "Identify the topic or theme of StackExchange posts based on the titles"
    ),
    "StackExchangeClusteringP2P": _mteb(
        "Identify the topic or theme of StackExchange posts based on the given paragraphs"
    ),
    "TwentyNewsgroupsClustering": _mteb("Identify the topic or theme of the given news articles"),
}
_BY_LOWER_NAME = {name.lower(): task for name, task in TASKS.items()}


def find_task(name: str) -> Task | None:
    return _BY_LOWER_NAME.get(name.lower())


def prefix_of(instruction: str) -> str:
    """A task description as the model's prefix; none for an empty one."""
    return query_prefix(instruction) if instruction else ""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What the server's settings say about inputs whose request does not."""

    query_instruction: str
    input_type: Side | None = None

    @classmethod
    def of(
        cls, query_instruction: str, input_type: Literal["none", "query", "passage"]
    ) -> Defaults:
        task = find_task(query_instruction)
        return cls(
            task.query if task else query_instruction,
            None if input_type == "none" else input_type,
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
        return prefix_of(instruction)
    if task is not None:
        return _task_prefix(task, side or model_side or "query") if task else ""
    if input_type == "":
        return ""
    side = side or model_side or defaults.input_type
    if side is None:
        return None
    return prefix_of(defaults.query_instruction) if side == "query" else ""


def _side(input_type: str) -> Side:
    side = INPUT_TYPES.get(input_type)
    if side is None:
        known = ", ".join(INPUT_TYPES)
        raise InvalidRequestError(
            f"unknown input_type {_shown(input_type)}; known: {known}", param="input_type"
        )
    return side


def _task_prefix(name: str, side: Side) -> str:
    task = find_task(name)
    if task is None:
        raise InvalidRequestError(
            f"unknown task {_shown(name)}; known: {', '.join(TASKS)} (GET /v1/instructions)",
            param="task",
        )
    return prefix_of(task.query if side == "query" else task.passage)


def _shown(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:64] + "…")
