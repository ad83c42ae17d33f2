"""Where a checkpoint is found. The hub's cache is laid out by hand, and no test goes online."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from model.errors import CheckpointError
from model.hub import PINNED_REVISIONS, card_license, locate
from model.loader import Checkpoint

CARD = "---\nlicense: cc-by-nc-4.0\nlanguage:\n- en\n---\n# NV-Embed\n"
OTHER_REVISION = "f" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_checkpoint: Path) -> Path:
    """A cache that holds nvidia/NV-Embed-v2 at its pinned revision, and another main."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--nvidia--NV-Embed-v2"
    for revision in (PINNED_REVISIONS["nvidia/NV-Embed-v2"], OTHER_REVISION):
        snapshot = repository / "snapshots" / revision
        shutil.copytree(golden_checkpoint, snapshot)
        (snapshot / "README.md").write_text(CARD)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OTHER_REVISION)
    return tmp_path


def test_the_shipped_model_goes_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden_checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("nv-embed-small", offline=True) == locate(None)
    shutil.copytree(golden_checkpoint, "nv-embed-small")  # one's own folder comes first
    assert locate("nv-embed-small", offline=True).path != locate(None).path


def test_the_pinned_revision_from_the_cache(cache: Path) -> None:
    source = locate("nvidia/NV-Embed-v2", offline=True)
    assert source.model_id == "nvidia/NV-Embed-v2"
    assert source.revision == PINNED_REVISIONS["nvidia/NV-Embed-v2"] == source.path.name
    assert source.license == "cc-by-nc-4.0"
    assert source.is_nvidia
    assert len(Checkpoint(source.path).shapes()) > 30


def test_a_branch_is_resolved_to_its_commit(cache: Path) -> None:
    source = locate("nvidia/NV-Embed-v2", revision="main", offline=True)
    assert source.revision == OTHER_REVISION


@pytest.mark.parametrize("model", ["nvidia/NV-Embed-v1", "nobody/nothing"])
def test_offline_and_not_in_the_cache(cache: Path, model: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"no folder {model} here, .* and --offline was given"
    ):
        locate(model, offline=True)


def test_a_revision_that_is_not_in_the_cache(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="not in the local cache"):
        locate("nvidia/NV-Embed-v2", revision="e" * 40, offline=True)


def test_a_folder(golden_checkpoint: Path) -> None:
    source = locate(str(golden_checkpoint))
    assert source.path == golden_checkpoint
    assert source.model_id == "golden"
    assert source.revision is None
    assert source.license is None
    assert not source.is_nvidia
    with pytest.raises(CheckpointError, match="--revision is for hub ids"):
        locate(str(golden_checkpoint), revision="main")


@pytest.mark.parametrize("model", ["/no/such/folder", "no such model", "a/b/c"])
def test_neither_a_folder_nor_an_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        locate(model)


@pytest.mark.parametrize(
    ("card", "expected"),
    [(CARD, "cc-by-nc-4.0"), ("# no front matter", None), ("---\n[\n---\n", None), (None, None)],
)
def test_the_licence_of_a_card(tmp_path: Path, card: str | None, expected: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert card_license(tmp_path) == expected
