"""The named tasks and their instruction texts: one table for the server and the evaluation.

The authors publish instructions for retrieval, STS and summaries with NV-Embed-v2; those for
classification and clustering are the prompts that MTEB publishes. Both are labelled. Knows
nothing of requests, and no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from model.tokenizer import query_prefix


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
    """The task of that name, in whatever case."""
    return _BY_LOWER_NAME.get(name.lower())


def _bare(name: str) -> str:
    """A name without what mteb puts around a data set's: Nano…, …HardNegatives, its kind, .v2."""
    name = re.sub(r"\.v\d+$", "", name.lower()).removeprefix("nano")
    for suffix in ("hardnegatives", "retrieval", "classification", "clustering"):
        name = name.removesuffix(suffix)
    return name


_BY_BARE_NAME = {_bare(name): task for name, task in TASKS.items()}
assert len(_BY_BARE_NAME) == len(TASKS), "two tasks have one bare name"


def find_variant(name: str) -> Task | None:
    """As `find_task`; also by the data set's bare name and for mteb's variants of a set:
    banking77, Banking77Classification.v2, NanoNQRetrieval, FEVERHardNegatives."""
    return _BY_BARE_NAME.get(_bare(name))


def prefix_of(instruction: str) -> str:
    """A task description as NV-Embed's prefix; none for an empty one."""
    return query_prefix(instruction) if instruction else ""
