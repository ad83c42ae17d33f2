"""mteb tasks whose data stand here, one of each kind that treats its texts differently."""

from __future__ import annotations

from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from mteb import TaskMetadata
from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS

HOMES = {
    "1": ("where does the camel live?", "Camels live in the desert, on little water."),
    "2": ("home of the polar bear", "Polar bears live on the ice of the Arctic."),
    "3": ("in which place do frogs live?", "Frogs live in ponds and in wet meadows."),
}
EXTRA = {"4": "Bread is baked from flour, water, salt and yeast."}
KINDS = {
    "food": ["bread and butter", "a bowl of soup", "fried eggs", "apple pie", "rice and beans"],
    "weather": ["heavy rain", "a cold wind", "snow tonight", "sunny and warm", "thick fog"],
}


def metadata(name: str, task_type: str, main_score: str, prompt: Any = None) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        type=task_type,
        main_score=main_score,
        prompt=prompt,
        description="A few sentences",
        dataset={"path": "none", "revision": "1"},
        category="t2c" if task_type == "Classification" else "t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


class TinySTS(AbsTaskSTS):
    metadata: ClassVar[TaskMetadata] = metadata("TinySTS", "STS", "cosine_spearman")

    def load_data(self, **_: Any) -> None:
        rows = [
            ("a man plays the guitar", "a man is playing a guitar", 5.0),
            ("a cat sits on the sofa", "a cat is on the couch", 4.0),
            ("a woman cuts an onion", "a woman slices bread", 2.0),
            ("the stock market fell", "a dog runs on the beach", 0.0),
        ]
        first, second, scores = zip(*rows, strict=True)
        columns = {"sentence1": first, "sentence2": second, "score": scores}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


class TinyRetrieval(AbsTaskRetrieval):
    metadata: ClassVar[TaskMetadata] = metadata(
        "TinyRetrieval",
        "Retrieval",
        "ndcg_at_10",
        {"query": "Find the animal's home", "document": "never used"},
    )

    def load_data(self, **_: Any) -> None:
        corpus = {**{name: passage for name, (_, passage) in HOMES.items()}, **EXTRA}
        queries = {name: query for name, (query, _) in HOMES.items()}
        split = {
            "corpus": Dataset.from_dict({"id": list(corpus), "text": list(corpus.values())}),
            "queries": Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
            "relevant_docs": {name: {name: 1} for name in queries},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class TinyClassification(AbsTaskClassification):
    metadata: ClassVar[TaskMetadata] = metadata("TinyClassification", "Classification", "accuracy")
    n_experiments = 2
    samples_per_label = 3

    def load_data(self, **_: Any) -> None:
        rows = [(text, label) for label, kind in enumerate(KINDS.values()) for text in kind]
        texts, labels = zip(*rows, strict=True)
        data = Dataset.from_dict({"text": texts, "label": labels})
        self.dataset = DatasetDict(train=data, test=data)
        self.data_loaded = True


TASKS = (TinySTS, TinyRetrieval, TinyClassification)
