"""Where a checkpoint is found. The hub's cache is laid out by hand, and no test goes online."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest

from model.errors import CheckpointError
from model.hub import PINNED_REVISIONS, locate
from model.weights.checkpoint import Checkpoint

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
    assert source.notice is not None
    assert len(Checkpoint(source.path).shapes()) > 30


@pytest.mark.parametrize("model", ["nvidia/nv-embed-v2", "NVIDIA/NV-EMBED-V2"])
def test_the_pin_does_not_depend_on_case(cache: Path, model: str) -> None:
    source = locate(model, offline=True)
    assert source.model_id == model
    assert source.revision == PINNED_REVISIONS["nvidia/NV-Embed-v2"] == source.path.name
    assert source.notice is not None


def test_a_folder_that_hides_a_hub_id_is_told(
    cache: Path,
    golden_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(cache)
    shutil.copytree(golden_checkpoint, "nvidia/nv-embed-v2")
    source = locate("nvidia/nv-embed-v2")
    assert source.revision is None
    folder = cache / "nvidia/nv-embed-v2"
    assert f"the model is the folder {folder}, not the hub's nvidia/nv-embed-v2" in caplog.text
    caplog.clear()
    for plain in ("./nvidia/nv-embed-v2", str(cache / "nvidia/nv-embed-v2"), "nvidia/nv-embed-v2/"):
        assert locate(plain).revision is None
    assert not caplog.records


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
    assert source.notice is None
    with pytest.raises(CheckpointError, match="--revision is for hub ids"):
        locate(str(golden_checkpoint), revision="main")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("nvidia/NV-Embed-v2", "nvidia/NV-Embed-v2"),
        ("my.model_1", "my.model_1"),
        ("C:\\models\\My Model", "My-Model"),
        ("/home/somebody/runs/large", "large"),
        ("./large/", "large"),
        ("a\nb\x1b[31m", "a-b-31m"),
        (".", "copy"),
        ("..", "copy"),
        ("/", "copy"),
        ("\ud83d", "copy"),
        ("", "copy"),
        (None, "copy"),
    ],
)
def test_a_name_that_clients_can_use(
    tmp_path: Path, golden_checkpoint: Path, said: str | None, name: str
) -> None:
    folder = shutil.copytree(golden_checkpoint, tmp_path / "copy")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"_name_or_path": said}))
    assert locate(str(folder)).model_id == name


def test_safetensors_that_are_no_part_of_the_weights_are_told(
    tmp_path: Path, golden_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(golden_checkpoint, tmp_path / "copy")
    (folder / "adapter_model.safetensors").touch()
    locate(str(folder))
    assert "no part of the weights: adapter_model.safetensors" in caplog.text


WRONG_PATHS = [
    ("./missing", "neither a folder nor"),
    ("../missing", "neither a folder nor"),
    ("missing/", "neither a folder nor"),
    ("~/missing", "neither a folder nor"),
    ("~nobody-of-that-name/x", "home directory"),
    ("C:\\models", "neither a folder nor"),
    ("", "is empty"),
    (" ", "is empty"),
    (__file__, "is a file"),
    (f"{__file__}/x", "neither a folder nor"),
    ("/dev/null", "is a file"),
    ("a\nb", r"'a\\nb' is neither"),
    ("a\0b", "neither a folder nor|null"),
    ("x" * 300, "too long"),
    ("a/" + "b" * 200, "no hub model can be named so"),
    ("a/b--c", "no hub model can be named so"),
    ("a/b.git", "no hub model can be named so"),
    ("é/ü", "neither a folder nor"),
    ("https://huggingface.co/nvidia/NV-Embed-v2", "neither a folder nor"),
]


@pytest.mark.parametrize(("model", "message"), WRONG_PATHS)
def test_a_wrong_path_is_one_line(cache: Path, model: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refusal:
        locate(model, offline=True)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_whatever_the_hubs_client_raises_is_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "nowhere")
    with pytest.raises(CheckpointError, match=r"^downloading nobody/nothing failed: ") as refusal:
        locate("nobody/nothing")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("model", ["/no/such/folder", "no such model", "a/b/c"])
def test_neither_a_folder_nor_an_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="neither a folder nor"):
        locate(model)
