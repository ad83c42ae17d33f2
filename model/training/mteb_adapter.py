"""mteb's tasks (the Massive Text Embedding Benchmark, mteb 2) on this project's models.

    import mteb
    from model.encoder import Encoder
    from model.tokenizer import Truncation
    from model.training.embedders import LocalEmbedder
    from model.training.mteb_adapter import MtebModel
    from model.training.remote import ServerEmbedder

    embed = LocalEmbedder(Encoder(), truncate=Truncation.END)
    mteb.evaluate(MtebModel(embed, "local/nv-embed-small"), mteb.get_tasks(["STS12"]))
    mteb.evaluate(MtebModel(ServerEmbedder("http://host:8000"), "served/nv-embed"), …)

Owns which side a text is on, and how its task is described to it. mteb is imported only where it
is called: what it is told, and why, can be read and tested without it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import UnsupportedError
from model.extras import how_to_install
from model.families import Side
from model.tasks import TASKS, find_variant
from model.training.embedders import Embedder

SYMMETRIC = frozenset(
    (
        "STS",
        "Classification",
        "MultilabelClassification",
        "Clustering",
        "PairClassification",
        "BitextMining",
        "Summarization",
        "Regression",
    )
)
"""Types of tasks whose texts are all queries, with the task described. In the others, retrieval and
reranking, documents are passages."""
_OF_A_TYPE = {"STS": TASKS["STS"], "Summarization": TASKS["SUMM"]}


def asked_of(
    name: str,
    task_type: str,
    prompt_type: str | None,
    prompt: str | Mapping[str, str] | None,
    fallback: str = "",
) -> tuple[Side, str]:
    """The side of a task's texts, and the description of the task that they get, "" for none.

    prompt_type: "query", "document", or None where mteb makes no difference. prompt: mteb's own for
    the task (of each side, or one), used where the shared table has none; fallback: mteb's for
    every task of that type, used last. A table's entry may name a text for documents too (Quora);
    otherwise documents get none, whatever mteb says: so the models were trained.
    """
    task = _OF_A_TYPE.get(task_type) or find_variant(name)
    if prompt_type == "document" and task_type not in SYMMETRIC:
        return "passage", task.passage if task else ""
    if task:
        return "query", task.query
    own = prompt if isinstance(prompt, str) else (prompt or {}).get("query", "")
    return "query", own or fallback


class MtebModel:
    """What `mteb.evaluate` takes as a model (its EncoderProtocol) around an `Embedder`.

    name: the model's in mteb's results, "organisation/model". Knows text alone.
    """

    def __init__(
        self,
        embed: Embedder,
        name: str,
        revision: str | None = None,
        *,
        instructions: bool = True,
    ) -> None:
        """instructions: False describes no task."""
        self._embed, self._instructions = embed, instructions
        self._name, self._revision = name, revision

    def encode(
        self,
        inputs: Iterable[Mapping[str, Sequence[str]]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """mteb's batches of texts -> [N, D]. Its batch size is not used: ours go by tokens.

        Raises UnsupportedError for images, sound or video.
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise UnsupportedError(
                    f"{task_metadata.name} is not a task of texts: {', '.join(batch)}"
                )
            texts += batch["text"]
        return self._embed(texts, *self.asked(task_metadata, prompt_type))

    def asked(self, task_metadata: Any, prompt_type: Any = None) -> tuple[Side, str]:
        """As `asked_of`, without a description where there shall be none."""
        kind = None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type))
        task = task_metadata
        side, described = asked_of(task.name, task.type, kind, task.prompt, _generic(task.name))
        return side, described if self._instructions else ""

    def similarity(self, first: NDArray[Any], second: NDArray[Any]) -> Any:
        """Cosines of each of `first` with each of `second`, a tensor [N, M]."""
        return _mteb("mteb.similarity_functions").cos_sim(first, second)

    def similarity_pairwise(self, first: NDArray[Any], second: NDArray[Any]) -> Any:
        """Cosines row by row, a tensor [N]."""
        return _mteb("mteb.similarity_functions").pairwise_cos_sim(first, second)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's description of a model: no more than its name and how it is compared."""
        meta = _mteb("mteb.models.model_meta")
        return meta.ModelMeta.create_empty(
            {
                "name": self._name,
                "revision": self._revision,
                "similarity_fn_name": meta.ScoringFunction.COSINE,
                "use_instructions": self._instructions,
            }
        )


def named_tasks(names: Sequence[str]) -> list[Any]:
    """mteb's tasks of these names. Raises UnsupportedError: no mteb, no such task."""
    try:
        return list(_mteb("mteb").get_tasks(tasks=list(names)))
    except KeyError as error:
        raise UnsupportedError(f"mteb knows no such task: {error.args[0]}") from None


def evaluate_tasks(
    model: MtebModel, tasks: Sequence[Any], results: Path
) -> dict[str, dict[str, float]]:
    """Run mteb's tasks. -> name of the task -> name of its main score -> value.

    results: a folder that gets mteb's own files with every score; a task that is there is run
    again. Raises UnsupportedError for data that cannot be had.
    """
    mteb = _mteb("mteb")
    cache = mteb.ResultCache(results)
    scores = {}
    for task in tasks:
        try:
            found = mteb.evaluate(
                model,
                task,
                cache=cache,
                overwrite_strategy="always",
                encode_kwargs={"batch_size": 256},
                co2_tracker=False,
                show_progress_bar=sys.stderr.isatty(),
            )
        except OSError as error:
            raise UnsupportedError(f"mteb could not run {task.metadata.name}: {error}") from error
        value = float(found.task_results[0].get_score())
        scores[task.metadata.name] = {task.metadata.main_score: value}
    return scores


def _generic(name: str) -> str:
    """mteb's prompt for any task of the same type as `name`'s."""
    return str(_mteb("mteb.abstasks.abstask").get_abstask_prompt(name))


def _mteb(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnsupportedError(f"this needs mteb: {how_to_install('mteb')}") from None
