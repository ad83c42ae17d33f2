"""Exported folders: their files, and the vectors that sentence-transformers has from them.

`make test-sentence-transformers` runs these tests with it; elsewhere those that
need it are skipped.
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import sentence_transformers_export
from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import FileError, UnsupportedError
from model.families import FAMILIES, NV_EMBED
from model.hub import ModelSource, locate
from model.prompts import Prompt
from model.sentence_transformers_export import export
from model.sentence_transformers_files import SentenceTransformersFiles
from model.tokenizer import Truncation
from server import cli
from tests.checkpoints import small_tokenizer_json
from tests.siblings import SIBLINGS, write_sibling

pytestmark = pytest.mark.whole
TASK = "Given a question, retrieve passages that answer the question"
TEXTS = [
    "x",
    "how long is a river?",
    "The committee met twice, and agreed on nothing. " * 9,
    "naïve café — 東京 🙂\n\ttwo  spaces",
    " a leading space",
    "word " * 100,
]
LIMIT = 64
RELEASE = tuple(int(part) for part in version("transformers").split(".")[:2])


@pytest.fixture(scope="module", params=SIBLINGS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Name, source, what was written of it. Texts are longer than the limit, and than the window
    of a causal mask."""
    name = request.param
    folder = tmp_path_factory.mktemp("exported")
    window = {"sliding_window": 32} if name in ("e5-mistral", "bge-en-icl") else {}
    source = write_sibling(folder / name, name, window)
    bert = source / "sentence_bert_config.json"
    bert.write_text(json.dumps({"max_seq_length": LIMIT, "do_lower_case": False}))
    (source / "LICENSE").write_text("terms")
    export(locate(str(source)), folder / "out")
    return name, source, folder / "out"


@pytest.fixture(scope="module")
def encoders(exported: tuple[str, Path, Path]) -> tuple[Encoder, Encoder]:
    """Of the source, and of what was written of it."""
    _name, *folders = exported
    source, out = (Encoder(folder, device="cpu", dtype="float32") for folder in folders)
    return source, out


def small_source(folder: Path) -> ModelSource:
    """With few pieces, where only folders matter."""
    write_sibling(folder, "e5-mistral")
    (folder / "tokenizer.json").write_text(small_tokenizer_json())
    return locate(str(folder))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_folder_is_of_the_same_family(
    exported: tuple[str, Path, Path], encoders: tuple[Encoder, Encoder]
) -> None:
    """Found by `auto`, with the same vectors here; nothing is said twice or of remote code."""
    _name, source, out = exported
    before, after = ModelConfig.from_dir(source), ModelConfig.from_dir(out)
    assert after.family == before.family
    assert after.max_input_tokens == before.max_input_tokens == LIMIT
    assert before.prompts.items() <= after.prompts.items()
    raw = read(out / "config.json")
    assert "auto_map" not in raw
    raw["_name_or_path"] = "own/name"  # no id of the hub, which would tell it alone
    files = SentenceTransformersFiles.of(out)
    assert ModelConfig.from_dict(raw, files=files).family == before.family
    for prompt in (before.family.prompt("query"), before.family.prompt("passage")):
        rows = [encoder.encode(TEXTS, prompt, truncate=Truncation.END) for encoder in encoders]
        np.testing.assert_array_equal(*rows)
    assert (out / "LICENSE").read_text() == "terms"
    assert not list(out.rglob("*.py"))


def test_the_weights_are_linked_or_copied(
    exported: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source, out = exported

    def no_links(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "copied").mkdir()
    sentence_transformers_export._link_weights(source, tmp_path / "copied")
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        assert (out / shard.name).samefile(shard)
        assert not (tmp_path / "copied" / shard.name).samefile(shard)
        assert (tmp_path / "copied" / shard.name).read_bytes() == shard.read_bytes()


def test_the_tokenizer_puts_bos_and_eos_by_itself(
    exported: tuple[str, Path, Path], encoders: tuple[Encoder, Encoder]
) -> None:
    """Also where a text is cut: as the family has it."""
    from tokenizers import Tokenizer

    _, _, out = exported
    ours = encoders[0].tokenizer
    theirs = Tokenizer.from_file(str(out / "tokenizer.json"))
    theirs.enable_truncation(LIMIT)
    for text in TEXTS:
        ids = ours.encode(text, max_tokens=LIMIT, truncate=Truncation.END).ids.tolist()
        assert theirs.encode(text).ids == ids
    settings = read(out / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "add_eos_token" not in settings


def test_prompts_of_both_sides(exported: tuple[str, Path, Path]) -> None:
    name, _, out = exported
    found = read(out / "config_sentence_transformers.json")
    prompts, bare = found["prompts"], found["default_prompt_name"]
    assert prompts.get("passage", prompts["document"]) == prompts["document"]
    assert (prompts["query"], prompts["document"], prompts.get(bare)) == {
        "e5-mistral": (f"Instruct: {TASK}\nQuery: ", "", None),
        "sfr-embedding-2": (f"Instruct: {TASK}\nQuery: ", "", None),
        "gritlm": (f"<|user|>\n{TASK}\n<|embed|>\n", "<|embed|>\n", "<|embed|>\n"),
        "bge-en-icl": (f"<instruct>{TASK}\n<query>", "", None),
        "bidirectional-mean": ("query: ", "passage: ", "passage: "),
        "nemotron-3-embed": ("query: ", "passage: ", "passage: "),
    }[name]
    assert read(out / "1_Pooling/config.json")["include_prompt"] is (name != "gritlm")


def test_what_cannot_be_exported(golden_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedError, match=r"latent pooler .* remote code: nothing was exported"
    ):
        export(locate(str(golden_checkpoint)), tmp_path / "out")
    source = small_source(tmp_path / "e5")
    for taken in (source.path, source.path / "config.json"):
        with pytest.raises(FileError, match="is there, and no empty folder"):
            export(source, taken)
    (tmp_path / "empty").mkdir()
    export(source, tmp_path / "empty")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"e5", "empty"}


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a link, and where one stands: a mount, too, cannot be replaced."""
    source = small_source(tmp_path / "e5")
    export(source, tmp_path / "new")
    expected = {path.name for path in (tmp_path / "new").iterdir()}
    for name in ("here", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("linked")
    monkeypatch.chdir(tmp_path / "here")
    inode = (tmp_path / "here").stat().st_ino
    for folder, named in ((tmp_path / "here", Path(".")), (tmp_path / "linked", tmp_path / "link")):
        export(source, named)
        assert {path.name for path in folder.iterdir()} == expected
        assert ModelConfig.from_dir(folder).family.name == "e5-mistral"
    assert (tmp_path / "here").stat().st_ino == inode
    assert (tmp_path / "link").is_symlink()
    for name in (".", str(tmp_path / "link"), str(tmp_path / "absent" / "out")):
        with pytest.raises(FileError, match=re.escape(name)):
            export(source, Path(name))


def test_a_full_folder_that_fails_is_left_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = small_source(tmp_path / "e5")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(sentence_transformers_export, "_link_weights", None)
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(TypeError):
            export(source, folder)
    assert not list((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"e5", "out"}


def test_the_command_says_the_licence_and_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_sibling(tmp_path / "sfr", "sfr-embedding-2")
    raw = read(source / "config.json")
    raw["_name_or_path"] = "Salesforce/SFR-Embedding-2_R"
    (source / "config.json").write_text(json.dumps(raw))
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    words = ["export", str(source), "--to", "sentence-transformers", "-o", str(tmp_path / "out")]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "The licence of the weights is cc-by-nc-4.0." in said
    assert "Salesforce's SFR-Embedding weights" in said
    assert "non-commercial use only" in said
    assert cli.main(words) == 2
    bge = write_sibling(tmp_path / "bge", "bge-en-icl")
    assert cli.main(["export", str(bge), *words[2:-1], str(tmp_path / "bge-out")]) == 0
    assert "Write '\\n<response>' behind each query" in capsys.readouterr().out


def test_every_family_is_exported_or_refused() -> None:
    assert {s.family for s in SIBLINGS.values()} | {NV_EMBED.name} == {f.name for f in FAMILIES}


def sentence_transformer(folder: Path) -> Any:
    library = pytest.importorskip(
        "sentence_transformers", reason="make test-sentence-transformers has it"
    )
    options = {"dtype" if RELEASE >= (4, 56) else "torch_dtype": torch.float32}
    return library.SentenceTransformer(str(folder), device="cpu", model_kwargs=options)


def compare(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found, dtype=np.float64)
    cosines = (found * expected).sum(axis=1)
    print(f"largest difference {np.abs(found - expected).max():.1e}, cosine {cosines.min():.7f}")
    assert cosines.min() >= 0.99999
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_the_vectors_of_sentence_transformers(
    exported: tuple[str, Path, Path], encoders: tuple[Encoder, Encoder]
) -> None:
    """With each prompt and without; together, so that they are padded, and cut."""
    name, _, out = exported
    config = ModelConfig.from_dir(out)
    family = config.family
    full = family.mask == "full"
    if RELEASE < (5, 0) and name == "nemotron-3-embed":
        with pytest.raises(Exception, match="ministral3"):
            sentence_transformer(out)
        return
    theirs = sentence_transformer(out)
    assert theirs.max_seq_length == LIMIT
    ours = encoders[0]

    def expected(prompt: Prompt, texts: list[str] = TEXTS) -> np.ndarray:
        return ours.encode(texts, prompt, truncate=Truncation.END)

    if RELEASE < (5, 2) and full:  # as docs/families.md says
        found = theirs.encode(TEXTS, prompt="")
        assert np.abs(found - expected(family.verbatim(""))).max() > 0.01
        return
    compare(theirs.encode(TEXTS, prompt=""), expected(family.verbatim("")))
    for prompt in theirs.prompts.values():
        compare(theirs.encode(TEXTS, prompt=prompt), expected(family.verbatim(prompt)))
    # encode_query and encode_document take the prompts of these names.
    compare(theirs.encode_document(TEXTS), expected(family.prompt("passage")))
    compare(theirs.encode(TEXTS), expected(family.prompt("passage")))
    if family.suffix:
        short = [text for text in TEXTS if len(text) < 50]
        by_hand = [text + family.suffix for text in short]
        asked = family.verbatim(theirs.prompts["query"], family.suffix)
        compare(theirs.encode_query(by_hand), expected(asked, short))
        twice = expected(family.prompt("query", TASK), short)
        found = theirs.encode_query(by_hand)
        print(f"of the authors' queries: cosine {(found * twice).sum(axis=1)}")
    else:
        task = TASK if family.template is not None else ""
        compare(theirs.encode_query(TEXTS), expected(family.prompt("query", task)))
