"""The loop: it learns, goes on exactly where it was killed, and exports what the server loads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model.attention.cpu import sdpa_by_length
from model.batch import Encoding
from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import CheckpointError
from model.hub import locate, packaged_checkpoint
from model.packing import Segments, pack
from model.training import deepen
from model.training.attention import grouped_products
from model.training.average import average
from model.training.corpus import Shuffle, load_corpus
from model.training.examples import DataError, Example, ScoredPair, is_held_out
from model.training.losses import ranking_loss, soft_label_loss
from model.training.network import load_trained
from model.training.objective import Draw, Objective
from model.training.plot import _smooth, plot
from model.training.settings import TrainingSettings, TrainingSettingsError
from model.training.states import RunFolder
from model.training.trainer import DivergedError, Trainer
from model.user_files import LockedError

ROOT = Path(__file__).parents[3]


def settings_of(checkpoint: Path, folder: Path, **changes: object) -> TrainingSettings:
    raw = {
        "model": str(checkpoint),
        "steps": 12,
        "data": {str(folder / "pairs.jsonl"): 1},
        "pairs_per_step": 6,
        "max_negatives": 1,
        "texts": str(folder / "texts.jsonl"),
        "vectors": str(folder / "vectors"),
        "projection": str(folder / "projection.safetensors"),
        "texts_per_step": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "validate_every": 6,
        "validation_rows": 8,
        "save_every": 3,
        "threads": 1,
        "dtype": "float32",
        **changes,
    }
    return TrainingSettings(**raw)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def settings(tiny_checkpoint: Path, tiny_data: Path) -> TrainingSettings:
    return settings_of(tiny_checkpoint, tiny_data)


@pytest.fixture(scope="module")
def finished(settings: TrainingSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    checkpoint = Trainer(settings, folder).run(progress=False)
    assert checkpoint == folder / "checkpoint"
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (state,) = folder.glob("state/step-0000012")
    return load_file(str(state / "model.safetensors"))


def same_weights(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_loss_falls(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    for loss in ("contrastive", "distillation"):
        values = [line[loss] for line in lines]
        assert np.mean(values[-3:]) < 0.9 * np.mean(values[:3]), values
    assert {"validation_mrr", "validation_cosine"} <= lines[-1].keys()


@pytest.mark.parametrize(
    "changes", [{}, {"stage": 2}, {"optimizer": "muon"}, {"scored_per_step": 4, "instructed": 0.5}]
)
def test_a_stopped_run_goes_on_exactly(
    settings: TrainingSettings, finished: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "scored_per_step" in changes:
        changes = {**changes, "scored": str(scored_file(tmp_path, 1, 2, 3, 4, 5))}
    if changes:
        settings = dataclasses.replace(settings, **changes)
        Trainer(settings, tmp_path / "whole").run(progress=False)
    stopped = tmp_path / "stopped"
    assert Trainer(settings, stopped).run(stop_after=7, progress=False) is None  # saved: 3, 6
    Trainer(settings, stopped).run(progress=False)
    whole = tmp_path / "whole" if changes else finished
    assert same_weights(stopped, whole)
    figures = [
        [(json.loads(x)["step"], json.loads(x)["loss"]) for x in path.read_text().splitlines()]
        for path in (stopped / "metrics.jsonl", whole / "metrics.jsonl")
    ]
    assert figures[0] == figures[1]
    if changes:
        assert not same_weights(stopped, finished)


def test_a_killed_process_goes_on_exactly(
    settings: TrainingSettings, finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings.to_json()))
    run = tmp_path / "run"
    command = [sys.executable, "-m", "server.cli", "train", str(file), "-o", str(run)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
        deadline = time.monotonic() + 60
        while not list(run.glob("state/step-*")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    states = sorted(path.name for path in run.glob("state/step-*"))
    assert states, "it was killed before its first state"
    assert states[-1] < "step-0000012", "it was killed after its last step"
    Trainer(settings, run).run(progress=False)
    assert same_weights(run, finished)


def test_the_metrics_are_drawn(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text())
    for path in plot(tmp_path):
        assert path.stat().st_size > 5_000, path


def test_a_running_mean() -> None:
    assert _smooth(np.arange(4.0)).tolist() == [0, 0.5, 1, 1.5]
    assert _smooth(np.arange(60.0))[-1] == np.arange(35, 60).mean()


def test_a_folder_of_another_run_is_refused(settings: TrainingSettings, finished: Path) -> None:
    other = dataclasses.replace(settings, temperature=0.5)
    message = r"other settings \(temperature: 0\.05 there, 0\.5 now\); set them back"
    with pytest.raises(TrainingSettingsError, match=message):
        Trainer(other, finished).run(progress=False)


@pytest.mark.parametrize("link", [None, Path.symlink_to, Path.hardlink_to])
def test_a_file_that_is_read_is_not_written_over(
    settings: TrainingSettings, tmp_path: Path, link: Callable[[Path, Path], None] | None
) -> None:
    """The careless wish to train a run's own checkpoint further, in the same folder."""
    start = tmp_path / "checkpoint"
    shutil.copytree(settings.model, start)
    if link:
        other = shutil.copytree(start, tmp_path / "other") / "model.safetensors"
        (start / "model.safetensors").unlink()
        link(start / "model.safetensors", other)
        start = other.parent
    before = (start / "model.safetensors").read_bytes()
    with pytest.raises(TrainingSettingsError, match=r"is read, and a run in .* writes over it"):
        RunFolder(tmp_path).claim(dataclasses.replace(settings, model=str(start)))
    assert (start / "model.safetensors").read_bytes() == before
    data = tmp_path / "run" / "metrics.jsonl"
    data.parent.mkdir()
    shutil.copy(next(iter(settings.data)), data)
    with pytest.raises(TrainingSettingsError, match=r"metrics\.jsonl is read"):
        RunFolder(data.parent).claim(dataclasses.replace(settings, data={str(data): 1}))


def test_two_runs_in_one_folder_are_one_too_many(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    with RunFolder(tmp_path).locked(), pytest.raises(LockedError, match="another run is writing"):
        Trainer(settings, tmp_path).run()
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_before_a_setting_existed_goes_on(
    settings: TrainingSettings, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(finished, folder)
    old = json.loads((folder / "settings.json").read_text())
    del old["lora_rank"], old["tokens_per_pass"]
    (folder / "settings.json").write_text(json.dumps(old))
    (folder / "inputs.json").unlink()
    RunFolder(folder).claim(settings)
    assert (folder / "inputs.json").exists()
    with pytest.raises(TrainingSettingsError, match="lora_rank: None there, 2 now"):
        RunFolder(folder).claim(dataclasses.replace(settings, lora_rank=2))


def test_other_threads_go_on_with_a_warning(
    settings: TrainingSettings, finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RunFolder(finished).claim(settings)
    assert not caplog.records
    RunFolder(finished).claim(dataclasses.replace(settings, threads=3))
    assert "threads = 1 and goes on with 3" in caplog.text


def test_changed_data_are_refused(
    settings: TrainingSettings, tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    ours = settings_of(Path(settings.model), data)
    folder = RunFolder(tmp_path / "run")
    folder.claim(ours)
    folder.claim(ours)
    (data / "vectors" / "00001.npy").write_bytes(b"one more")
    with pytest.raises(TrainingSettingsError, match=r"other contents of \S+00001\.npy; put"):
        folder.claim(ours)
    (data / "vectors" / "00001.npy").unlink()
    lines = (data / "pairs.jsonl").read_text()
    (data / "pairs.jsonl").write_text(lines.replace("red", "pink"))
    with pytest.raises(TrainingSettingsError, match=r"other contents of \S+pairs\.jsonl; put"):
        folder.claim(ours)


def test_losses_are_logged_unweighted(settings: TrainingSettings, tmp_path: Path) -> None:
    heavy = dataclasses.replace(settings, distillation_weight=8.0, contrastive_weight=0.5)
    Trainer(settings, tmp_path / "one").run(stop_after=1, progress=False)
    Trainer(heavy, tmp_path / "heavy").run(stop_after=1, progress=False)
    one, other = (
        json.loads((tmp_path / run / "metrics.jsonl").read_text()) for run in ("one", "heavy")
    )
    for loss in ("contrastive", "distillation"):
        assert one[loss] == other[loss]
    assert one["loss"] == pytest.approx(one["contrastive"] + one["distillation"])
    assert other["loss"] == pytest.approx(0.5 * one["contrastive"] + 8 * one["distillation"])


def test_a_share_of_texts_is_read_behind_instructions(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    """For the same vector as the bare text's, each behind some task's; the share is drawn anew."""
    whole = dataclasses.replace(settings, instructed=1.0, texts_per_step=40)
    trainer = Trainer(whole, tmp_path / "whole")
    draw = trainer.draw()
    prompts = draw.prompted(trainer.family)[-40:]
    assert [text for text, _ in prompts] == draw.texts
    around = {str(prompt) for _, prompt in prompts}
    assert len(around) > 10
    assert all("Instruct: " in prompt for prompt in around)
    vectors, _ = trainer.embed(draw.prompted(trainer.family))
    rows = [trainer.corpus.places[text] for text in draw.texts]
    wanted = torch.from_numpy(trainer.corpus.targets[rows])
    distances = 1 - (vectors[-40:] * wanted).sum(-1)
    alone = dataclasses.replace(draw, examples=[], negatives=[], owners=[])
    losses = trainer.objective.losses(alone, vectors[-40:])
    assert losses["distillation"].item() == pytest.approx(distances.mean().item(), rel=1e-5)
    half = Trainer(dataclasses.replace(whole, instructed=0.5), tmp_path / "half").draw()
    assert 8 < sum(map(bool, half.tasks)) < 32
    assert half.texts == draw.texts
    assert not any(Trainer(settings, tmp_path / "none").draw().tasks)


def test_each_text_of_a_step_stands_at_its_place(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    """Scored pairs beside all else: their loss is of their own rows, asked with their own task."""
    trainer = Trainer(dataclasses.replace(settings, texts_per_step=2), tmp_path / "run")
    examples = [Example("q0", "p0", ("n0",), "ask"), Example("q1", "p1", (), "compare", True)]
    scored = [ScoredPair("a0", "b0", 1.0, "like"), ScoredPair("a1", "b1", 4.0)]
    draw = Draw(examples, ["n0"], [0], ["t0", "t1"], ["", "find"], scored)
    asked = [("q0", "ask"), ("q1", "compare"), ("p0", ""), ("p1", "compare"), ("n0", "")]
    asked += [("t0", ""), ("t1", "find"), ("a0", "like"), ("a1", ""), ("b0", "like"), ("b1", "")]
    family = trainer.family
    expected = [
        (text, family.prompt("query" if task or text[0] in "qab" else "passage", task))
        for text, task in asked
    ]
    assert draw.prompted(family) == expected
    vectors = torch.nn.functional.normalize(
        torch.randn(11, 32, generator=torch.Generator().manual_seed(2)), dim=-1
    )
    losses = trainer.objective.losses(draw, vectors)
    wanted = ranking_loss(
        vectors[7:9],
        vectors[9:],
        torch.tensor([1.0, 4.0]),
        temperature=settings.temperature,
    )
    assert losses["scores"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert trainer.objective.weight("scores") == settings.scored_weight


def scored_file(folder: Path, *scores: float) -> Path:
    """Pairs about red boats, alike, and about blue ones, not: by their score."""
    rows = [
        {"first": f"{word} {word} {n}", "second": f"{word} {other} {n}", "score": score}
        for n, score in enumerate(scores)
        for word, other in [("red" if score > 2 else "blue", "boat")]
    ]
    path = folder / "scored.jsonl"
    path.write_text("".join(json.dumps(row | {"task": "compare"}) + "\n" for row in rows))
    return path


def test_cosines_come_into_the_scores_order(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on scored pairs alone; the held-out ones are measured and never drawn."""
    monkeypatch.setattr("model.training.examples.HELD_OUT", 4)
    scored = scored_file(tmp_path, *[0, 5] * 20)
    alone = {"data": {}, "texts": None, "texts_per_step": 0, "projection": None, "vectors": None}
    changes = {"scored": str(scored), "scored_per_step": 16, "steps": 40, "validate_every": 40}
    settings = settings_of(tiny_checkpoint, tiny_data, **alone, **changes)
    trainer = Trainer(settings, tmp_path / "run")
    before = trainer.validate()["validation_spearman"]
    drawn = {text for p in trainer.draw().scored for text in (p.first, p.second)}
    assert drawn
    assert not any(map(is_held_out, drawn))
    trainer.run(progress=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["scores"] for line in lines]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert json.loads(lines[-1])["validation_spearman"] > before


def test_scores_that_are_all_alike_are_refused(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    changes = {"scored": str(scored_file(tmp_path, 3, 3, 3)), "scored_per_step": 2}
    with pytest.raises(DataError, match=r"scored\.jsonl: no two pairs of different scores"):
        Trainer(settings_of(tiny_checkpoint, tiny_data, **changes), tmp_path / "run")


def test_stage_2_refuses_an_example_without_negatives(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    lines = (tiny_data / "pairs.jsonl").read_text().splitlines()
    row = json.loads(lines[4])
    lines[4] = json.dumps({"query": row["query"], "positive": row["positive"]})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(lines))
    ours = settings_of(tiny_checkpoint, tiny_data, data={str(file): 1})
    assert load_corpus(ours).examples
    with pytest.raises(DataError, match=r"pairs\.jsonl, line 5: no negatives"):
        load_corpus(dataclasses.replace(ours, stage=2))
    file.write_text("")
    with pytest.raises(DataError, match="holds no examples"):
        load_corpus(ours)


def test_an_export_names_its_source(
    finished: Path, settings: TrainingSettings, tmp_path: Path
) -> None:
    """And carries its licence over; the folder holds nothing that serving has no use for."""
    assert {path.name for path in (finished / "checkpoint").iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "README.md")
    }
    assert "Trained from `tiny-embed`. 12 steps" in (finished / "checkpoint/README.md").read_text()
    start = tmp_path / "start"
    shutil.copytree(settings.model, start)
    (start / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    (start / "LICENSE.txt").write_text("the terms")
    run = dataclasses.replace(settings, model=str(start), steps=1, name="mine", stage=2)
    checkpoint = Trainer(run, tmp_path / "run").run(progress=False)
    assert checkpoint is not None
    source = locate(str(checkpoint))
    assert (source.license, source.model_id) == ("cc-by-nc-4.0", "mine")
    assert (checkpoint / "LICENSE.txt").read_text() == "the terms"
    card = (checkpoint / "README.md").read_text()
    assert "base_model: tiny-embed" in card
    assert "1 steps of `nv-embed train` (stage 2; all weights)." in card
    assert "cc-by-nc-4.0, holds for these weights, too. Copied from it: LICENSE.txt." in card


def test_the_export_serves_the_same_vectors(finished: Path, tiny_checkpoint: Path) -> None:
    texts = ["a cat over here", "the moon", "bread " * 20]
    encoder = Encoder(finished / "checkpoint", device="cpu", dtype="float32")
    trained = load_trained(finished / "checkpoint", device=torch.device("cpu"))
    for instruction in ("", "Instruct: find the phrase\nQuery: "):
        encodings = [encoder.tokenizer.encode(text, instruction, max_tokens=99) for text in texts]
        with torch.no_grad():
            expected = trained(pack(encodings, torch.device("cpu")), sdpa_by_length).numpy()
        served = encoder.encode(texts, instruction)
        assert np.abs(served - expected).max() < 1e-5
    before = Encoder(tiny_checkpoint, device="cpu", dtype="float32").encode(texts)
    assert np.abs(before - encoder.encode(texts)).max() > 0.01
    assert encoder.tokenizer.vocab_size == 32_000


def test_the_average_of_checkpoints(
    finished: Path, tiny_checkpoint: Path, golden_checkpoint: Path, tmp_path: Path
) -> None:
    folders = [finished / "checkpoint", tiny_checkpoint]
    mean = load_trained(average(folders, tmp_path / "mean"), device=torch.device("cpu"))
    first, second = (load_trained(f, device=torch.device("cpu")).state_dict() for f in folders)
    for name, parameter in mean.state_dict().items():
        assert torch.allclose(parameter, (first[name] + second[name]) / 2, atol=2e-3), name
    assert mean.config.matryoshka_dimensions == ()
    with pytest.raises(CheckpointError, match="another size"):
        average([golden_checkpoint, tiny_checkpoint], tmp_path / "no")


def test_the_first_numbers_are_a_vector_too(
    tiny_checkpoint: Path, tiny_data: Path, finished: Path, tmp_path: Path
) -> None:
    """A Matryoshka run says so in config.json; a run from it without them does not, nor a mean
    with a checkpoint that was not trained so."""
    settings = settings_of(tiny_checkpoint, tiny_data, matryoshka_dimensions=[2, 4])
    run = Trainer(settings, tmp_path / "run")
    assert run.run(progress=False) == tmp_path / "run/checkpoint"
    config = ModelConfig.from_dir(tmp_path / "run/checkpoint")
    assert config.matryoshka_dimensions == (4, 2)
    both = [tmp_path / "run/checkpoint", finished / "checkpoint"]
    for folders, widths in ((both[:1] * 2, (4, 2)), (both, ()), (both[::-1], ())):
        mean = average(folders, tmp_path / "mean")
        assert ModelConfig.from_dir(mean).matryoshka_dimensions == widths
    again = Trainer(settings_of(both[0], tiny_data, steps=1), tmp_path / "again")
    again.run(progress=False)
    assert ModelConfig.from_dir(tmp_path / "again/checkpoint").matryoshka_dimensions == ()
    width = config.hidden_size
    with pytest.raises(TrainingSettingsError, match=f"has {width}, and .* no more than {width}"):
        Trainer(settings_of(tiny_checkpoint, tiny_data, matryoshka_dimensions=[width]), tmp_path)


def test_instruction_tokens_stay_out_of_the_pool(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    """Exchanging the hidden states of instruction rows changes nothing behind the backbone."""
    trainer = Trainer(settings, tmp_path)
    seen: list[tuple[int, Segments]] = []

    def hook(_module: object, inputs: tuple[torch.Tensor, Segments]) -> None:
        seen.append((len(inputs[0]), inputs[1]))

    trainer.model.pooler.register_forward_pre_hook(hook)
    instruction = "Instruct: find the phrase\nQuery: "
    trainer.embed([("a cat", instruction), ("a cat", "")])
    skipped = trainer.tokenizer.pool_start(instruction)
    whole = len(trainer.tokenizer.encode("a cat", instruction, max_tokens=99))
    alone = len(trainer.tokenizer.encode("a cat", max_tokens=99))
    assert seen[0][0] == whole - skipped + alone
    assert seen[0][1].lengths == (whole - skipped, alone)


def test_vectors_come_in_the_order_of_the_prompts(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    trainer = Trainer(settings, tmp_path)
    prompts = [("fish", ""), ("a long text about a fish and a boat", "x: "), ("tea milk", "")]
    together, tokens = trainer.embed(prompts)
    alone = torch.cat([trainer.embed([prompt])[0] for prompt in prompts])
    assert torch.allclose(together, alone, atol=1e-5)
    assert tokens == sum(trainer.embed([prompt])[1] for prompt in prompts)


def test_the_training_kernel_equals_the_served_one() -> None:
    rng = np.random.default_rng(0)
    encodings = [
        Encoding(rng.integers(3, 99, n).astype(np.int32), start)
        for n, start in ((30, 4), (29, 0), (17, 3), (17, 16), (5, 0), (2, 1))
    ]
    batch = pack(encodings, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for queries in (batch.seqs, batch.pooled):
        q = torch.randn(sum(queries.lengths), 4, 8, generator=generator)
        k, v = torch.randn(2, batch.num_tokens, 2, 8, generator=generator)
        expected = sdpa_by_length(q, k, v, queries, batch.seqs)
        assert torch.allclose(grouped_products(q, k, v, queries, batch.seqs), expected, atol=1e-5)


def test_the_causal_mask_hides_the_rows_behind() -> None:
    """Row by row against plain attention over the rows up to it, pooled queries included."""
    rng = np.random.default_rng(0)
    encodings = [
        Encoding(rng.integers(3, 99, n).astype(np.int32), start) for n, start in ((9, 4), (7, 0))
    ]
    batch = pack(encodings, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, batch.num_tokens, 2, 8, generator=generator)
    for queries, starts in ((batch.seqs, (0, 0)), (batch.pooled, (4, 0))):
        q = torch.randn(sum(queries.lengths), 4, 8, generator=generator)
        found = grouped_products(q, k, v, queries, batch.seqs, causal=True)
        row = 0
        for start, first, length in zip(starts, (0, 9), (9, 7), strict=True):
            for position in range(start, length):
                for head in range(4):
                    keys = k[first : first + position + 1, head // 2]
                    weights = (keys @ q[row, head] * 8**-0.5).softmax(0)
                    expected = weights @ v[first : first + position + 1, head // 2]
                    assert torch.allclose(found[row, head], expected, atol=1e-5)
                row += 1


@pytest.mark.parametrize("pooling", ["mean", "eos"])
def test_an_ablated_pooler_learns_and_is_not_exported(
    settings: TrainingSettings, tmp_path: Path, pooling: str
) -> None:
    ablated = dataclasses.replace(settings, pooling=pooling, causal=True, steps=6)
    trainer = Trainer(ablated, tmp_path)
    before = trainer.embed_texts(["a cat"], "query")
    hidden: list[torch.Tensor] = []
    trainer.model.backbone.register_forward_hook(lambda *args: hidden.append(args[2]))
    after = trainer.embed_texts(["a cat over here"], "query", "find")
    rows = hidden[0].mean(0) if pooling == "mean" else hidden[0][-1]
    assert np.abs(after[0] - torch.nn.functional.normalize(rows, dim=0).numpy()).max() < 1e-5
    assert trainer.run(progress=False) is None
    assert not (tmp_path / "checkpoint").exists()
    assert np.abs(trainer.embed_texts(["a cat"], "query") - before).max() > 1e-3


def test_a_deeper_checkpoint_computes_the_same_at_first(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep"
    monkeypatch.setattr(sys, "argv", ["deepen", str(tiny_checkpoint), str(out), "--layers", "4"])
    deepen.main()
    encoders = [Encoder(folder, device="cpu", dtype="float32") for folder in (tiny_checkpoint, out)]
    first, second = (encoder.encode(["a cat", "the moon " * 9]) for encoder in encoders)
    assert ModelConfig.from_dir(out).num_hidden_layers == 4
    assert np.abs(first - second).max() < 1e-6
    deeper = load_trained(out, device=torch.device("cpu"))
    trained = deeper(
        pack([Encoding(np.array([1, 9, 2], np.int32), 0)], torch.device("cpu")), sdpa_by_length
    )
    trained[0, 0].backward()
    new = deeper.backbone.layers[2].mlp.down_proj.weight.grad
    assert new is not None
    assert new.abs().max() > 0


def test_in_batch_negatives_are_never_the_own_label(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Classes by label: what others of a query's class have for a positive is its own positive."""
    labels = ("animal", "vehicle", "drink")
    rows = [
        {"query": f"text {n}", "positive": labels[n % 3], "negatives": [labels[(n + 1) % 3]]}
        for n in range(24)
    ]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": {str(tmp_path / "labels.jsonl"): 1}, "texts": None, "vectors": None}
    changes |= {"projection": None, "texts_per_step": 0, "pairs_per_step": 10, "temperature": 0.2}
    trainer = Trainer(settings_of(tiny_checkpoint, tiny_data, **changes), tmp_path / "run")
    draw = trainer.draw()
    assert len({e.positive for e in draw.examples}) < len(draw.examples) == 10
    prompted = draw.prompted(trainer.family)
    with torch.no_grad():
        vectors, _ = trainer.embed(prompted)
        (loss,) = trainer.objective.losses(draw, vectors).values()
    passages = [text for text, _ in prompted[10:]]
    expected = []
    for place, example in enumerate(draw.examples):
        scores = (vectors[10:] @ vectors[place] / 0.2).exp()
        rivals = [text != example.positive for text in passages]
        expected.append(-torch.log(scores[place] / (scores[place] + scores[rivals].sum())))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_the_teacher_says_what_is_no_negative_and_how_near_the_others_are(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    """Of four queries with a negative each the teacher knows all but the last query's. Its vectors
    are put here: the second positive and the third negative answer the first query as well."""
    teach = dataclasses.replace(settings, false_negatives=0.95, soft_label_weight=1.0)
    corpus = load_corpus(teach)
    axes = np.eye(corpus.targets.shape[1], dtype=np.float32)
    examples = [Example(f"q{n}", f"p{n}", (f"n{n}",)) for n in range(4)]
    vectors_of = {f"{kind}{n}": axes[n + 4 * (kind == "n")] for kind in "qpn" for n in range(4)}
    vectors_of |= {"p1": axes[0] * 0.96 + axes[1] * 0.28, "n2": axes[0]}
    del vectors_of["q3"]
    taught = dataclasses.replace(
        corpus,
        places={text: row for row, text in enumerate(vectors_of)},
        targets=np.stack([*vectors_of.values()]),
    )
    objective = Objective(teach, taught, torch.device("cpu"))
    draw = Draw(examples, [f"n{n}" for n in range(4)], [0, 1, 2, 3], [], [], [])
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(12, len(axes), generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    losses = objective.losses(draw, vectors)
    scores = (vectors[:4] @ vectors[4:].T / teach.temperature).exp()
    hidden = torch.zeros(4, 8, dtype=torch.bool)
    hidden[0, 1] = hidden[0, 6] = True  # p1 and n2, of the first query
    expected = -(scores.diagonal() / scores.masked_fill(hidden, 0).sum(1)).log().mean()
    assert losses["contrastive"].item() == pytest.approx(expected.item(), rel=1e-5)
    known = torch.from_numpy(np.stack([vectors_of[t] for t in draw.in_order if t != "q3"]))
    wanted = soft_label_loss(
        vectors[:3], vectors[4:], known[:3], known[3:], temperature=teach.temperature
    )
    assert losses["soft_labels"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert objective.weight("soft_labels") == 1.0


def test_an_epoch_sees_every_row_once() -> None:
    shuffle = Shuffle(10, seed=1, stream=2)
    drawn = [row for step in range(5) for row in shuffle.draw(step, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert Shuffle(10, seed=1, stream=2).draw(3, 4) == drawn[12:16]


def test_held_out_texts_are_not_learnt_from(
    settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_corpus(settings)
    monkeypatch.setattr("model.training.examples.HELD_OUT", 4)
    corpus = load_corpus(settings)
    measured = {corpus.texts[row] for row in corpus.held_out_texts}
    assert 0 < len(corpus.held_out) <= 8
    assert 0 < len(measured) <= 8
    assert len(corpus.drawn) < 0.9 * len(whole.drawn)
    learnt = {corpus.texts[row] for row in corpus.drawn}
    for example in corpus.examples:
        learnt |= {example.query, example.positive, *example.negatives}
    assert not any(map(is_held_out, learnt))
    assert all(is_held_out(e.query) for e in corpus.held_out)
    assert all(map(is_held_out, measured))


def test_the_same_texts_are_held_out_in_every_run(
    settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.training.examples.HELD_OUT", 4)
    other = load_corpus(dataclasses.replace(settings, seed=77))
    assert load_corpus(settings).held_out_texts == other.held_out_texts
    assert load_corpus(settings).held_out == other.held_out


def test_a_weight_repeats_rows(
    tiny_checkpoint: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.training.corpus.is_held_out", lambda _text: False)
    data = {str(tiny_data / "pairs.jsonl"): 2.5}
    corpus = load_corpus(settings_of(tiny_checkpoint, tiny_data, data=data))
    assert len(corpus.examples) == 150


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 3}, "stage is 3"),
        ({"texts": None}, "texts_per_step needs texts"),
        ({"vectors": None}, "texts need vectors$"),
        ({"scored": "x.jsonl"}, "scored and scored_per_step need one another"),
        ({"scored_per_step": 4}, "scored and scored_per_step need one another"),
        ({"data": {"x.jsonl": 1}, "texts_per_step": 0, "instructed": 0.5}, "needs texts_per_step"),
        ({"scored": "x.jsonl", "scored_per_step": 1}, "scored_per_step is 1: scores are compared"),
        ({"data": {}, "texts_per_step": 0}, "nothing to learn"),
        ({"dtype": "int8"}, "dtype"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; adamw or muon"),
        ({"optimizer": "muon", "lora_rank": 4}, "which lora_rank freezes"),
        ({"pooling": "max"}, "pooling"),
        ({"steps": 0}, "at least 1"),
        ({"steps": "9"}, "steps is '9', not a whole number"),
        ({"save_every": True}, "save_every is True"),
        ({"compile": 1}, "compile is 1, not true or false"),
        ({"other_case": 1.5}, "other_case is 1.5, it is at most 1"),
        ({"temperature": 0}, "temperature is 0, it is above 0"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"decay": 1.5}, "decay is 1.5, it is at most 1"),
        ({"first_text": -1}, "first_text is -1, it is at least 0"),
        ({"first_text": 50, "last_text": 50}, "last_text is 50, not behind first_text, 50"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"data": {"pairs.jsonl": 0}}, "the weight of pairs.jsonl is 0"),
        ({"data": ["pairs.jsonl"]}, "data is .*, not an object"),
        ({"stage": 2, "max_negatives": 0}, "max_negatives is 0"),
        ({"export_dtype": "int8"}, "export_dtype"),
        ({"seed": 10**30}, "seed is 1000.*, it is at most"),
        ({"steps": 10**12}, "steps is 1000.*, it is at most"),
        ({"threads": 10**6}, "threads is 1000000, it is at most 1024"),
        ({"max_tokens": 10**6}, "max_tokens is 1000000, it is at most 32768"),
        ({"false_negatives": 0.9, "stage": 2}, "false_negatives needs texts, and stage 1"),
        ({"false_negatives": -1}, "false_negatives is -1, it is at least 0"),
        (
            {"soft_label_weight": 1, "texts": None, "texts_per_step": 0},
            "soft_label_weight needs texts",
        ),
        ({"matryoshka_dimensions": 64}, "matryoshka_dimensions is 64, not a list"),
        ({"matryoshka_dimensions": [64, 0]}, "not numbers above 0"),
        ({"matryoshka_dimensions": [True]}, "not numbers above 0"),
        ({"decay": float("nan")}, "decay is nan, it is at most 1"),
    ],
)
def test_contradictions_are_refused(
    tiny_checkpoint: Path, tiny_data: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(TrainingSettingsError, match=message):
        settings_of(tiny_checkpoint, tiny_data, **changes)


def test_settings_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"model": "m", "steps": 5, "data": {"d.jsonl": 1}}))
    read = TrainingSettings.read(file, threads=2)
    assert read.model == str(tmp_path / "m")
    assert read.data == {str(tmp_path / "d.jsonl"): 1}
    assert read.threads == 2
    file.write_text(json.dumps({"model": "m", "stepps": 5}))
    with pytest.raises(TrainingSettingsError, match=r"unknown stepps; did you mean steps\?"):
        TrainingSettings.read(file)
    file.write_text('{"model": "m", "steps": 5, "steps": 6, "data": {"d.jsonl": 1}}')
    with pytest.raises(TrainingSettingsError, match="it has 'steps' twice"):
        TrainingSettings.read(file)
    file.write_text("\ufeff" + json.dumps({"model": "m", "steps": 5, "data": {"d.jsonl": 1}}))
    assert TrainingSettings.read(file).steps == 5


def test_the_shipped_model_goes_by_its_name(tmp_path: Path) -> None:
    raw = {"model": "nv-embed-small", "steps": 1, "data": {"d.jsonl": 1}}
    read = TrainingSettings.of(raw, tmp_path / "run.json", tmp_path)
    assert read.model == str(packaged_checkpoint())
    (tmp_path / "nv-embed-small").mkdir()  # one's own of that name comes first
    read = TrainingSettings.of(raw, tmp_path / "run.json", tmp_path)
    assert read.model == str(tmp_path / "nv-embed-small")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": 5, "steps": 1}', "model is 5, not a path"),
        ('{"model": "", "steps": 1}', "model is '', not a path"),
        ('{"model": "m", "steps": 1, "texts": ["a"]}', r"texts is \['a'\], not a path"),
        ("[" * 100_000, "nested too deeply"),
        ("[1]", "not a JSON object"),
        ("model: m", "cannot be read"),
        ('{"steps": 1}', "missing .*'model'"),
    ],
)
def test_a_file_that_holds_no_settings(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(TrainingSettingsError, match=message) as error:
        TrainingSettings.read(tmp_path / "run.json")
    assert "run.json" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([("a", "b", [])], {}, "there are no negatives: the 1 example"),
        ([("a", "b", []), ("c", "b", [])], {}, "there are no negatives: the 2 example"),
        ([("a", "b", ["b"])], {}, "there are no negatives"),
        ([("a", "b", ["n"])], {"max_negatives": 0}, "there are no negatives"),
        ([("a", "b", ["n"])], {}, "draws 16 examples, and the data have 1 different positives"),
        ([("a", "b", []), ("c", "d", [])], {}, "draws 16 examples, and the data have 2 different"),
        ([("a", "b", ["n"])], {"stage": 2}, None),
    ],
)
def test_a_run_that_learns_little_is_warned_of(
    tiny_checkpoint: Path,
    tiny_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    rows: list[tuple[str, str, list[str]]],
    changes: dict[str, object],
    message: str | None,
) -> None:
    file = tmp_path / "few.jsonl"
    lines = [json.dumps({"query": q, "positive": p, "negatives": n}) for q, p, n in rows]
    file.write_text("\n".join(lines))
    few = {"data": {str(file): 1}, "pairs_per_step": 16, **changes}
    load_corpus(settings_of(tiny_checkpoint, tiny_data, **few))
    assert message is None or message in caplog.text
    assert ("negatives are few" in caplog.text) == (message is not None and "draws" in message)
    assert "no example is held out" in caplog.text


def test_a_run_that_diverges_says_so(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path
) -> None:
    settings = settings_of(tiny_checkpoint, tiny_data, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(DivergedError, match=r"not finite at step \d+: a lower learning_rate"):
        Trainer(settings, tmp_path / "run").run(progress=False)


@pytest.mark.parametrize("key", ["texts", "vectors", "projection", "data"])
@pytest.mark.parametrize("kind", ["missing", "garbage"])
def test_what_a_run_is_made_of_is_there(
    tiny_checkpoint: Path, tiny_data: Path, tmp_path: Path, key: str, kind: str
) -> None:
    place = tmp_path / "x"
    if kind == "garbage":
        (tmp_path / "x").mkdir()
        (tmp_path / "x/00000.npy").write_bytes(b"\x93NUMPY and no more")
        place = place if key == "vectors" else place / "00000.npy"
    named = {str(place): 1} if key == "data" else str(place)
    with pytest.raises(DataError, match=f"{tmp_path}/x"):
        load_corpus(settings_of(tiny_checkpoint, tiny_data, **{key: named}))


def test_too_few_vectors_are_an_error(tiny_checkpoint: Path, tiny_data: Path) -> None:
    with pytest.raises(DataError, match="120 vectors of 500"):
        load_corpus(settings_of(tiny_checkpoint, tiny_data, last_text=500))


def test_a_first_text_behind_the_last_is_an_error(tiny_checkpoint: Path, tiny_data: Path) -> None:
    with pytest.raises(DataError, match=r"first_text is 120, and .* has 120 texts"):
        load_corpus(settings_of(tiny_checkpoint, tiny_data, first_text=120))
