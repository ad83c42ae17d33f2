"""mteb's tasks on our models: which side gets which instruction; and, where mteb is installed (it
is too heavy for requirements-test.lock), the real `mteb.evaluate` on tasks whose data are here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.encoder import Encoder
from model.errors import UnsupportedError
from model.families import Side
from model.tasks import TASKS
from model.training import mteb_adapter
from model.training.embedders import LocalEmbedder
from model.training.mteb_adapter import MtebModel, asked_of, evaluate_tasks, named_tasks
from model.training.remote import ServerEmbedder
from server import cli
from tests.server.processes import ServerProcess

NQ = TASKS["NQ"].query
QUORA = TASKS["QuoraRetrieval"].query
STS = "Retrieve semantically similar text"
BANKING = TASKS["Banking77Classification"].query


@pytest.mark.parametrize(
    ("name", "task_type", "prompt_type", "prompt", "expected"),
    [
        # The authors' own, the query alone; Quora's on both sides.
        ("NQ", "Retrieval", "query", "mteb's", ("query", NQ)),
        ("NQ", "Retrieval", "document", "mteb's", ("passage", "")),
        ("NanoNQRetrieval", "Retrieval", "query", None, ("query", NQ)),
        ("QuoraRetrieval", "Retrieval", "document", None, ("passage", QUORA)),
        ("STS12", "STS", None, "mteb's", ("query", STS)),
        ("SummEval", "Summarization", None, None, ("query", TASKS["SUMM"].query)),
        # A symmetric task that tells its sides apart all the same
        ("STS12", "STS", "document", None, ("query", STS)),
        ("Banking77Classification.v2", "Classification", None, None, ("query", BANKING)),
        # mteb's, where the authors have none
        ("CQADupstack", "Retrieval", "query", {"query": "mteb's"}, ("query", "mteb's")),
        ("CQADupstack", "Retrieval", "document", {"document": "mteb's"}, ("passage", "")),
        ("AskUbuntuDupQuestions", "Reranking", "query", "mteb's", ("query", "mteb's")),
        ("AskUbuntuDupQuestions", "Reranking", "document", "mteb's", ("passage", "")),
        ("Tatoeba", "BitextMining", None, "mteb's", ("query", "mteb's")),
        ("TwitterURLCorpus", "PairClassification", None, {"query": "mteb's"}, ("query", "mteb's")),
        ("New", "InstructionRetrieval", "query", None, ("query", "any")),
        ("New", "Clustering", None, None, ("query", "any")),
        ("New", "Retrieval", "document", None, ("passage", "")),
    ],
)  # fmt: skip
def test_which_side_is_asked_what(
    name: str,
    task_type: str,
    prompt_type: str | None,
    prompt: str | Mapping[str, str] | None,
    expected: tuple[Side, str],
) -> None:
    assert asked_of(name, task_type, prompt_type, prompt, fallback="any") == expected


class Recorder:
    """An embedder that remembers what it was asked; the vectors count letters."""

    def __init__(self) -> None:
        self.calls: list[tuple[Side, str, int]] = []

    def __call__(self, texts: Sequence[str], side: Side, task: str, /) -> NDArray[np.float32]:
        self.calls.append((side, task, len(texts)))
        counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        rows = np.array(counts, dtype=np.float32) + 0.01
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_batches_are_joined_and_embedded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mteb_adapter, "_generic", lambda name: "mteb's for any")
    embed = Recorder()
    task = SimpleNamespace(name="NQ", type="Retrieval", prompt=None)
    batches = [{"text": ["a", "b"]}, {"text": ["c"]}]
    query = SimpleNamespace(value="query")  # mteb's PromptType is an enumeration
    assert MtebModel(embed, "a/b").encode(batches, task_metadata=task, prompt_type=query).shape == (
        3,
        26,
    )
    MtebModel(embed, "a/b").encode(batches, task_metadata=task, prompt_type="document")
    bare = MtebModel(embed, "a/b", instructions=False)
    bare.encode(batches, task_metadata=task, prompt_type=query)
    bare.encode(batches, task_metadata=task, prompt_type="document")
    assert embed.calls == [
        ("query", NQ, 3),
        ("passage", "", 3),
        ("query", "", 3),
        ("passage", "", 3),
    ]
    with pytest.raises(UnsupportedError, match="NQ is not a task of texts: image"):
        bare.encode([{"image": ["…"]}], task_metadata=task)


def test_without_mteb_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert cli.main(["evaluate", "--mteb", "STS12"]) == 2
    assert "-m pip install 'mteb<3" in capsys.readouterr().err


# From here on with the real mteb. It warns of its own affairs.


@pytest.fixture(scope="module")
def tasks() -> list[Any]:
    """One task of each of three types, with data in memory."""
    pytest.importorskip("mteb", reason="mteb is too heavy for the test packages")
    from tests.model.training import mteb_tasks

    return [task() for task in mteb_tasks.TASKS]


@pytest.mark.filterwarnings("ignore")
def test_mteb_accepts_the_class(tasks: list[Any]) -> None:
    from mteb.models.models_protocols import EncoderProtocol

    model = MtebModel(Recorder(), "local/letters", "1")
    assert isinstance(model, EncoderProtocol)
    assert (model.mteb_model_meta.name, model.mteb_model_meta.revision) == ("local/letters", "1")
    rows = np.array([[1.0, 0.0], [0.6, 0.8]], dtype=np.float32)
    np.testing.assert_allclose(model.similarity(rows, rows), rows @ rows.T, atol=1e-6)
    pairs = model.similarity_pairwise(rows, rows[::-1].copy())
    np.testing.assert_allclose(pairs, [0.6, 0.6], atol=1e-6)
    with pytest.raises(UnsupportedError, match="mteb knows no such task"):
        named_tasks(["NoSuchTask"])
    assert [task.metadata.name for task in named_tasks(["SciFact"])] == ["SciFact"]


@pytest.mark.filterwarnings("ignore")
def test_mteb_runs_its_tasks_with_the_right_instructions(tasks: list[Any], tmp_path: Path) -> None:
    embed = Recorder()
    scores = evaluate_tasks(MtebModel(embed, "local/letters"), tasks, tmp_path)
    assert {name: list(found) for name, found in scores.items()} == {
        "TinySTS": ["cosine_spearman"],
        "TinyRetrieval": ["ndcg_at_10"],
        "TinyClassification": ["accuracy"],
    }
    assert embed.calls[:2] == [("query", STS, 4)] * 2  # both columns, the authors' words
    assert set(embed.calls[2:4]) == {("query", "Find the animal's home", 3), ("passage", "", 4)}
    classify = "Classify user passages."  # mteb's for every classification
    assert {call[:2] for call in embed.calls[4:]} == {("query", classify)}
    files = {path.name for path in tmp_path.rglob("*.json")}
    assert {f"{name}.json" for name in scores} <= files


def check_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    """The tasks are easy, and the shipped model is trained."""
    assert scores["TinySTS"]["cosine_spearman"] > 0.7
    assert scores["TinyRetrieval"]["ndcg_at_10"] > 0.8
    assert scores["TinyClassification"]["accuracy"] > 0.7


@pytest.mark.filterwarnings("ignore")
def test_the_command_scores_the_shipped_model(
    tasks: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mteb_adapter, "named_tasks", lambda names: tasks)  # no downloads in tests
    call = ["evaluate", "--dtype", "float32", "--threads", "1", "--results", str(tmp_path)]
    assert cli.main([*call, "--mteb", "TinySTS", "TinyRetrieval", "TinyClassification"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_scores(answer["scores"])
    assert list(tmp_path.glob("results/local__nv-embed-small/**/TinySTS.json"))


@pytest.mark.filterwarnings("ignore")
def test_a_server_scores_as_the_offline_encoder(tasks: list[Any], tmp_path: Path) -> None:
    offline = MtebModel(LocalEmbedder(Encoder(dtype="float32", threads=1)), "local/nv-embed-small")
    expected = evaluate_tasks(offline, tasks, tmp_path / "offline")
    server = ServerProcess(None, "--api-key", "a-secret", log=tmp_path / "log.txt")
    try:
        model = MtebModel(ServerEmbedder(server.url, api_key="a-secret"), "served/nv-embed-small")
        found = evaluate_tasks(model, tasks, tmp_path / "served")
    finally:
        server.stop()
    check_scores(found)
    for name, scores in expected.items():
        assert found[name] == pytest.approx(scores, abs=1e-4), name
