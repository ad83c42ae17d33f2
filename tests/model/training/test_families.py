"""Every family trains, and comes out as what it was: its layout, its prompts, its vectors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import CheckpointError, UntoldFamilyError
from model.families import E5_MISTRAL
from model.tokenizer import BOS_ID, EOS_ID
from model.training.attention import grouped_products
from model.training.average import average
from model.training.deepen import main as deepen
from model.training.export import export_like
from model.training.mistral_import import is_plain_mistral
from model.training.network import load_trained
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.trainer import Trainer
from model.weights.headers import weight_files
from tests.model.test_attention import naive, random_heads, segments
from tests.model.training.conftest import WORDS
from tests.server.processes import serving
from tests.siblings import SIBLINGS, write_sibling

ROOT = Path(__file__).parents[3]
TASK = "find the phrase"
TEXTS = ["red 7", "there is a red over here", "bread " * 40, "a cat, a dog and a fish"]
TRAINED = ["gritlm", "bge-en-icl", "bidirectional-mean", "nemotron-3-embed", "sfr-embedding-2"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """With a task and without: not every family has a place for one."""
    folder, files = tmp_path_factory.mktemp("pairs"), {}
    for described in (True, False):
        rows = [
            {
                "query": f"{WORDS[number % 15]} {number}",
                "positive": f"there is a {WORDS[number % 15]} over here, number {number}",
                **({"task": TASK, "symmetric": number % 3 == 0} if described else {}),
            }
            for number in range(60)
        ]
        files[described] = folder / f"{described}.jsonl"
        files[described].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def settings(model: Path, data: Path, **changes: object) -> TrainingSettings:
    given = {
        "steps": 12,
        "pairs_per_step": 8,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "validate_every": 6,
        "validation_rows": 4,
        "dtype": "float32",
        "export_dtype": "float32",
        "threads": 1,
    }
    return TrainingSettings(model=str(model), data={str(data): 1}, **{**given, **changes})  # type: ignore[arg-type]


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("name", TRAINED)
def test_trained_and_served_alike(name: str, pairs: dict[bool, Path], tmp_path: Path) -> None:
    window = {} if SIBLINGS[name].config["sliding_window"] is None else {"sliding_window": 16}
    source = write_sibling(tmp_path / name, name, window)
    config = ModelConfig.from_dir(source)
    described = config.family.template is not None
    trainer = Trainer(settings(source, pairs[described]), tmp_path / "run")
    folder = trainer.run(progress=False)
    assert folder is not None
    falling = losses(tmp_path / "run")
    assert np.mean(falling[-3:]) < 0.8 * np.mean(falling[:3]), falling

    served = Encoder(folder, device="cpu", dtype="float32")
    assert served.tokenizer.family == config.family
    assert ModelConfig.from_dir(folder).prompts == config.prompts
    before = Encoder(source, device="cpu", dtype="float32")
    for side in ("query", "passage"):
        prompt = config.family.prompt(side, TASK if described and side == "query" else "")
        with torch.no_grad():
            trainer.model.eval()
            ours = trainer.embed([(text, prompt) for text in TEXTS])[0].numpy()
        np.testing.assert_allclose(served.encode(TEXTS, prompt), ours, rtol=0, atol=1e-5)
        assert np.abs(before.encode(TEXTS, prompt) - ours).max() > 0.01


def names(folder: Path) -> set[str]:
    return {name for file in weight_files(folder) for name in file.tensors}


def test_the_layout_is_the_source_s(pairs: dict[bool, Path], tmp_path: Path) -> None:
    """Names, config.json and what lies beside, but for the output layer, which nothing reads."""
    for name, before in (("e5-mistral", ""), ("gritlm", "model.")):
        source = write_sibling(tmp_path / name, name)
        (source / "LICENSE").write_text("terms")
        once = settings(source, pairs[True], steps=1, export_dtype="bfloat16", name="own/tuned")
        folder = Trainer(once, tmp_path / f"run-{name}").run(progress=False)
        assert folder is not None
        assert names(folder) == names(source) - {"lm_head.weight"}
        assert all(tensor.startswith(before) for tensor in names(folder))
        said = json.loads((source / "config.json").read_text())
        raw = json.loads((folder / "config.json").read_text())
        assert raw == {**said, "_name_or_path": "own/tuned", "torch_dtype": "bfloat16"}
        (weights,) = weight_files(folder)
        assert {tensor.dtype for tensor in weights.tensors.values()} == {"BF16"}
        for path in source.rglob("*"):
            if path.is_file() and path.name != "config.json" and "safetensors" not in path.name:
                assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes()
        assert (folder / "1_Pooling" / "config.json").is_file() is (name == "e5-mistral")
        assert f"Trained from `{'GritLM/GritLM-7B' if name == 'gritlm' else name}`" in (
            (folder / "README.md").read_text()
        )


def last_states(folder: Path, ids: list[list[int]]) -> np.ndarray:
    """transformers' own MistralModel: the final state of each last token, of length 1."""
    from transformers import MistralModel

    model = MistralModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_lora_of_an_e5_layout_into_a_served_model(pairs: dict[bool, Path], tmp_path: Path) -> None:
    """`nv-embed train` as a process, `nv-embed serve` as another, transformers as the referee."""
    pytest.importorskip("peft")
    source = write_sibling(tmp_path / "e5", "e5-mistral", {"sliding_window": 16})
    asked = settings(source, pairs[True], lora_rank=4, name="tuned-embed", steps=10)
    (tmp_path / "settings.json").write_text(json.dumps(asked.to_json()))
    words = ["train", str(tmp_path / "settings.json"), "-o", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "server.cli", *words]
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    folder = tmp_path / "run" / "checkpoint"
    falling = losses(tmp_path / "run")
    assert np.mean(falling[-3:]) < np.mean(falling[:3]), falling

    tokenizer = Encoder(folder, device="cpu", dtype="float32").tokenizer
    assert tokenizer.family is E5_MISTRAL
    prompts = [E5_MISTRAL.prompt("query", TASK), E5_MISTRAL.prompt("passage")]
    ids = [
        tokenizer.encode(text, prompt, max_tokens=512).ids.tolist()
        for prompt in prompts
        for text in TEXTS
    ]
    assert all((row[0], row[-1]) == (BOS_ID, EOS_ID) for row in ids)
    expected, base = last_states(folder, ids), last_states(source, ids)
    assert np.abs(expected - base).max() > 0.01
    with serving(folder, log=tmp_path / "log") as server:
        found = []
        for fields in ({"input_type": "query", "instruction": TASK}, {"input_type": "passage"}):
            body = {"model": "tuned-embed", "input": TEXTS, "encoding_format": "float", **fields}
            answer = server.client.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            found += [row["embedding"] for row in answer.json()["data"]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_task_that_has_no_place_is_refused(pairs: dict[bool, Path], tmp_path: Path) -> None:
    source = write_sibling(tmp_path / "mean", "bidirectional-mean")
    with pytest.raises(TrainingSettingsError, match=r"take no task: .*'find the phrase'"):
        Trainer(settings(source, pairs[True]), tmp_path / "run")
    (tmp_path / "texts.jsonl").write_text('{"text": "a text"}\n')
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/00000.npy", np.ones((1, 8), dtype=np.float16))
    texts = {"texts": str(tmp_path / "texts.jsonl"), "vectors": str(tmp_path / "vectors")}
    with pytest.raises(TrainingSettingsError, match=r"take no task: .* and `instructed`"):
        Trainer(
            settings(source, pairs[False], instructed=0.5, texts_per_step=1, **texts),
            tmp_path / "run",
        )


def test_what_is_not_an_nv_embed_has_no_ablation(pairs: dict[bool, Path], tmp_path: Path) -> None:
    source = write_sibling(tmp_path / "e5", "e5-mistral")
    with pytest.raises(CheckpointError, match="no ablation begins there"):
        Trainer(settings(source, pairs[True], pooling="mean"), tmp_path / "run")
    with pytest.raises(TrainingSettingsError, match="family is 'e5', not auto, nv-embed"):
        settings(source, pairs[True], family="e5")


def test_the_family_may_be_named(
    pairs: dict[bool, Path], tiny_mistral: Path, tmp_path: Path
) -> None:
    """A Mistral of no family, trained as e5-mistral; an e5-mistral's trunk under a new pooler."""
    once = settings(tiny_mistral, pairs[True], family="e5-mistral", steps=1)
    folder = Trainer(once, tmp_path / "e5-run").run(progress=False)
    assert folder is not None
    assert Encoder(folder, device="cpu").tokenizer.family is E5_MISTRAL
    source = write_sibling(tmp_path / "e5", "e5-mistral")
    anew = Trainer(settings(source, pairs[True], family="nv-embed"), tmp_path / "new")
    assert anew.model.config.num_latents == 8
    assert anew.family.name == "nv-embed"


def without_words(folder: Path, name_or_path: str | None = None) -> Path:
    """The checkpoint, its files telling no family; that of the hub's id, if any."""
    shutil.rmtree(folder / "1_Pooling", ignore_errors=True)
    for name in ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"):
        (folder / name).unlink(missing_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    for key in ("auto_map", "is_causal", "_name_or_path"):
        raw.pop(key, None)
    raw |= {"_name_or_path": name_or_path} if name_or_path else {}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", [*TRAINED[:3], "e5-mistral"])
def test_a_family_that_only_a_name_told_is_written_down(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next training would make an NV-Embed of it without a word."""
    family = SIBLINGS[name].family
    source = without_words(write_sibling(tmp_path / name, name))
    with pytest.raises(UntoldFamilyError):
        ModelConfig.from_dir(source)
    trained = load_trained(source, device=torch.device("cpu"), family=family)
    folders = [export_like(source, trained, tmp_path / "trained", name="own/tuned")]
    folders.append(average([source, source], tmp_path / "mean", family))
    words = [str(source), str(tmp_path / "deep"), "--layers", "4", "--family", family]
    monkeypatch.setattr(sys, "argv", ["deepen", *words])
    save_file(
        {k: v for shard in source.glob("*.safetensors") for k, v in load_file(shard).items()},
        source / "model.safetensors",
    )
    for shard in (*source.glob("model-*"), *source.glob("*.index.json")):
        shard.unlink()
    deepen()
    texts = TEXTS[:2]
    before = Encoder(source, device="cpu", dtype="float32", family=family)
    for folder in (*folders, tmp_path / "deep"):
        assert not is_plain_mistral(folder)
        served = Encoder(folder, device="cpu", dtype="float32")
        assert served.tokenizer.family.name == family
        for side in ("query", "passage"):
            prompt = before.tokenizer.family.prompt(side)
            assert served.tokenizer.family.prompt(side) == prompt
            same = np.abs(served.encode(texts, prompt) - before.encode(texts, prompt)).max()
            assert same < 2e-3  # in 16 bit


def test_the_name_of_the_hub_may_go(tmp_path: Path) -> None:
    source = write_sibling(tmp_path / "sfr", "sfr-embedding-2")
    without_words(source, "Salesforce/SFR-Embedding-2_R")
    trained = load_trained(source, device=torch.device("cpu"))
    assert trained.config.family is E5_MISTRAL
    folder = export_like(source, trained, tmp_path / "tuned", name="own/tuned")
    assert ModelConfig.from_dir(folder).family is E5_MISTRAL
    assert json.loads((folder / "config.json").read_text())["_name_or_path"] == "own/tuned"


def test_what_becomes_an_nv_embed_is_said(
    pairs: dict[bool, Path], tiny_mistral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Trainer(settings(tiny_mistral, pairs[True]), tmp_path / "run")
    assert "tells its family: it becomes an NV-Embed with a new pooler" in caplog.text
    caplog.clear()
    Trainer(settings(tiny_mistral, pairs[True], family="nv-embed"), tmp_path / "named")
    assert "becomes" not in caplog.text


def test_averaged_and_deepened_it_stays_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_sibling(tmp_path / "gritlm", "gritlm")
    mean = average([source, source], tmp_path / "mean")
    weights, folder = load_file(str(mean / "model.safetensors")), tmp_path / "deep"
    trained = load_trained(source, device=torch.device("cpu"))
    norm = trained.backbone.norm.weight.half()
    assert torch.equal(weights["model.norm.weight"], norm)
    monkeypatch.setattr(sys, "argv", ["deepen", str(mean), str(folder), "--layers", "5"])
    deepen()
    shallow, deep = (Encoder(path, device="cpu", dtype="float32") for path in (mean, folder))
    assert deep.tokenizer.family.name == "gritlm"
    assert len(load_trained(folder, device=torch.device("cpu")).backbone.layers) == 5
    prompt = deep.tokenizer.family.prompt("passage")
    deeper, before = deep.encode(TEXTS, prompt), shallow.encode(TEXTS, prompt)
    np.testing.assert_allclose(deeper, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("window", [1, 5, 12, 4096])
def test_the_gradient_under_a_window(window: int) -> None:
    """Lengths that are padded together, and queries of the last rows alone: none is NaN."""
    keys, queries = segments([14, 13, 11, 12]), segments([14, 13, 1, 3])
    found = []
    for kernel in (grouped_products, naive):
        heads = [x.requires_grad_() for x in random_heads(4, 2, queries, keys)]
        out = kernel(*heads, queries, keys, causal=True, window=window)
        (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
        found.append([x.grad for x in heads])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
