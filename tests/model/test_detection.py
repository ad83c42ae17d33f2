"""Which family a folder belongs to, and what contradicts one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig
from model.detection import HUB_IDS
from model.errors import CheckpointError
from model.families import FAMILIES
from model.hub import PINNED_REVISIONS
from model.tokenizer import NVEmbedTokenizer
from server.settings import Settings
from tests.siblings import SIBLINGS, write_sibling, write_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("detection")
    return {name: write_sibling(base / name, name) for name in SIBLINGS}


def edited(source: Path, folder: Path, edits: dict[str, Callable[[Any], object]]) -> Path:
    """A copy without weights, in which JSON files are changed; None takes a file away."""
    for path in source.rglob("*.json"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    for name, edit in edits.items():
        raw = json.loads((folder / name).read_text())
        edit(raw)
        (folder / name).write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_folder_tells_its_family(folders: dict[str, Path], name: str) -> None:
    family = SIBLINGS[name].family
    assert ModelConfig.from_dir(folders[name]).family.name == family
    assert ModelConfig.from_dir(folders[name], family).family.name == family


def test_the_hubs_ids_tell_theirs() -> None:
    raw = SIBLINGS["e5-mistral"].config
    for model_id, family in HUB_IDS.items():
        if family.model_type == raw["model_type"]:
            assert ModelConfig.from_dict(raw, model_id=model_id.upper()).family is family
    assert HUB_IDS.keys() == PINNED_REVISIONS.keys()
    assert all(len(revision) == 40 for revision in PINNED_REVISIONS.values())


def test_the_option_knows_each_family() -> None:
    schema = Settings.model_json_schema()["properties"]["family"]
    assert schema["enum"] == ["auto", *(family.name for family in FAMILIES)]


def test_what_cannot_be_told_is_refused_with_what_was_found(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(folders["e5-mistral"], tmp_path / "e5", {})
    (folder / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError) as refusal:
        ModelConfig.from_dir(folder)
    words = ("model_type 'mistral'", "is_causal None", "vocab_size 32000", "no 1_Pooling")
    assert all(word in str(refusal.value) for word in (*words, "--family e5-mistral, gritlm"))
    assert ModelConfig.from_dir(folder, "e5-mistral").family.name == "e5-mistral"
    with pytest.raises(CheckpointError, match="did you mean e5-mistral"):
        ModelConfig.from_dir(folder, "e5-mistrl")


Edits = dict[str, Callable[[Any], object]]
POOLING = "1_Pooling/config.json"
PROMPTS = "config_sentence_transformers.json"


def pooled_by(mode: str) -> Callable[[Any], object]:
    return lambda raw: raw.update(
        {key: key == f"pooling_mode_{mode}" for key in raw if key.startswith("pooling_mode")}
    )


CONTRADICTIONS: list[tuple[str, str, Edits, str]] = [
    ("e5-mistral", "auto", {"config.json": lambda raw: raw.update(is_causal=False)}, "be told"),
    ("e5-mistral", "e5-mistral", {"config.json": lambda r: r.update(is_causal=False)}, "is_causal"),
    ("e5-mistral", "e5-mistral", {POOLING: pooled_by("mean_tokens")}, "says mean"),
    ("e5-mistral", "e5-mistral", {POOLING: pooled_by("cls_token")}, "says cls"),
    ("sfr-embedding-2", "bge-en-icl", {}, "<instruct>, <query>, <response>"),
    ("e5-mistral", "bge-en-icl", {}, "its prompt 'sts_query'"),
    ("e5-mistral", "gritlm", {}, "says last"),
    ("e5-mistral", "nv-embed", {}, "model_type is 'mistral', not 'nvembed'"),
    ("e5-mistral", "nemotron-3-embed", {}, "model_type is 'mistral'"),
    ("e5-mistral", "bidirectional-mean", {}, "says last"),
    ("gritlm", "e5-mistral", {}, "GritLM's code"),
    ("gritlm", "bidirectional-mean", {}, "GritLM's code"),
    ("bge-en-icl", "e5-mistral", {}, "room for the markers"),
    ("bidirectional-mean", "e5-mistral", {}, "is_causal is False"),
    (
        "nemotron-3-embed",
        "auto",
        {"config.json": lambda r: r.pop("is_causal")},
        "is_causal is None",
    ),
    ("nemotron-3-embed", "auto", {"config.json": lambda r: r.update(pooling="last")}, "says last"),
    ("nemotron-3-embed", "auto", {POOLING: pooled_by("lasttoken")}, "says last"),
    ("nemotron-3-embed", "auto", {POOLING: lambda r: r.update(include_prompt=False)}, "leaves pro"),
    ("nemotron-3-embed", "auto", {PROMPTS: lambda r: r["prompts"].update(query="q: ")}, "'q: '"),
    (
        "e5-mistral",
        "auto",
        {PROMPTS: lambda r: r["prompts"].update(sts_query="Represent this: ")},
        "sts_query",
    ),
    (
        "e5-mistral",
        "auto",
        {"modules.json": lambda r: r.append({"type": "sentence_transformers.models.Dense"})},
        "Dense",
    ),
    (
        "e5-mistral",
        "auto",
        {"sentence_bert_config.json": lambda r: r.update(do_lower_case=True)},
        "do_lower_case",
    ),
]


@pytest.mark.parametrize(
    ("name", "family", "edits", "word"),
    CONTRADICTIONS,
    ids=[f"{name} as {family}: {word}" for name, family, _, word in CONTRADICTIONS],
)
def test_a_folder_that_contradicts_its_family_is_refused(
    folders: dict[str, Path], tmp_path: Path, name: str, family: str, edits: Edits, word: str
) -> None:
    folder = edited(folders[name], tmp_path / "edited", edits)
    with pytest.raises(CheckpointError) as refusal:
        NVEmbedTokenizer.from_dir(folder, family)
    assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_kind_of_several_models_says_its_own_prefixes(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def other(raw: Any) -> None:
        raw["prompts"] = {"query": "search: ", "document": "text: "}

    folder = edited(folders["bidirectional-mean"], tmp_path / "mean", {PROMPTS: other})
    family = ModelConfig.from_dir(folder).family
    assert family.prompt("query").prefix == ("search: ",)
    assert family.prompt("passage").prefix == ("text: ",)


@pytest.mark.parametrize("adds_eos", [True, False])
def test_the_tokenizers_settings_do_not_matter(
    folders: dict[str, Path], tmp_path: Path, adds_eos: bool
) -> None:
    def settings(raw: Any) -> None:
        raw.update(add_eos_token=adds_eos, add_bos_token=not adds_eos)

    folder = edited(folders["e5-mistral"], tmp_path / "e5", {"tokenizer_config.json": settings})
    ids = NVEmbedTokenizer.from_dir(folder).encode("some words", max_tokens=99).ids.tolist()
    assert (ids[0], ids[-1]) == (1, 2)
    assert ids.count(1) == ids.count(2) == 1


def test_a_tokenizer_with_anothers_markers_is_refused(tmp_path: Path) -> None:
    """A vocabulary that was rounded up does not tell bge-en-icl from e5-mistral; its markers do."""
    folder = write_sibling(tmp_path / "bge", "bge-en-icl", {"vocab_size": 32064})
    assert ModelConfig.from_dir(folder).family.name == "e5-mistral"
    with pytest.raises(CheckpointError, match=r"the markers of bge-en-icl, .* name its --family"):
        NVEmbedTokenizer.from_dir(folder)
    assert NVEmbedTokenizer.from_dir(folder, "bge-en-icl").family.name == "bge-en-icl"


def test_a_tokenizer_without_the_markers_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = edited(folders["bge-en-icl"], tmp_path / "bge", {})
    write_tokenizer(folder, markers=("<instruct>", "<query>"))
    with pytest.raises(CheckpointError, match="no special token <response>"):
        NVEmbedTokenizer.from_dir(folder)


def test_lengths_end_where_cards_and_windows_advise(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    e5 = ModelConfig.from_dir(folders["e5-mistral"])
    assert (e5.max_input_tokens, e5.most_input_tokens, e5.window) == (4096, 32_768, 4096)
    short = {"sentence_bert_config.json": lambda raw: raw.update(max_seq_length=512)}
    folder = edited(folders["e5-mistral"], tmp_path / "short", short)
    assert ModelConfig.from_dir(folder).max_input_tokens == 512
    gritlm = ModelConfig.from_dir(folders["gritlm"])
    assert (gritlm.max_input_tokens, gritlm.most_input_tokens, gritlm.window) == (
        4096,
        32_768,
        None,
    )
    both = {"config.json": lambda raw: raw.update(sliding_window=1024)}
    folder = edited(folders["bidirectional-mean"], tmp_path / "both", both)
    assert ModelConfig.from_dir(folder).most_input_tokens == 1024
