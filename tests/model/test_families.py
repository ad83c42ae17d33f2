"""The table of families: what a row decides, on a row that the product does not have."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import families
from model.batch import Encoding, RunnerOptions
from model.config import ModelConfig
from model.errors import CheckpointError
from model.families import FAMILIES, NV_EMBED
from model.packing import pack
from model.prompts import Prompt
from model.runner import ModelRunner
from model.tokenizer import NVEmbedTokenizer, Truncation, query_prefix
from model.weights.names import expected_shapes
from tests.model.emulated_cuda import emulated
from tests.toy_family import CONFIG, TOY, write

CPU = torch.device("cpu")
IN_16_BITS = 0.997
"""Cosine to float32: one row is pooled, so nothing averages bfloat16's rounding out."""
needs_varlen = pytest.mark.skipif(
    importlib.util.find_spec("torch.nn.attention.varlen") is None,
    reason="this torch has no varlen_attn",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", [*FAMILIES, TOY])
        yield write(tmp_path_factory.mktemp("families") / "toy")


def encodings() -> list[Encoding]:
    rng = np.random.default_rng(0)
    parts = [(5, 0), (33, 20), (64, 63), (33, 1)]
    return [Encoding(rng.integers(3, 32000, n).astype(np.int32), start) for n, start in parts]


def test_each_row_can_be_recognised() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    with pytest.raises(CheckpointError, match=r"'qwen', this server runs 'ministral3', 'mistral'"):
        ModelConfig.from_dict({"model_type": "qwen"})


def test_the_row_decides_which_tensors_there_are(checkpoint: Path) -> None:
    config = ModelConfig.from_dir(checkpoint)
    names = expected_shapes(config)
    assert config.family is TOY
    assert "layers.0.self_attn.q_proj.weight" in names
    assert len(names) == 2 + 9 * config.num_hidden_layers, "and no pooler's"
    latent = replace(config, family=replace(TOY, pooler="latent", prefix="x."), num_latents=2)
    assert {name.partition(".")[0] for name in expected_shapes(latent)} == {
        "x",
        "latent_attention_model",
    }


def test_a_window_is_applied_under_a_causal_mask_alone(checkpoint: Path) -> None:
    config = ModelConfig.from_dir(checkpoint)
    assert (config.window, config.most_input_tokens) == (512, CONFIG["max_position_embeddings"])
    with pytest.raises(CheckpointError, match="sliding_window"):
        ModelConfig.from_dict({**CONFIG, "sliding_window": "wide"})


@pytest.mark.parametrize("truncate", [Truncation.END, Truncation.START])
def test_the_row_decides_whether_a_cut_input_keeps_its_eos(
    checkpoint: Path, truncate: Truncation
) -> None:
    text, prefix = "one two three four five six seven eight", "Task: count\nText: "
    ours = NVEmbedTokenizer.from_dir(checkpoint)
    theirs = NVEmbedTokenizer(ours._tokenizer, NV_EMBED)
    whole = ours.encode(text, prefix, max_tokens=99)
    skipped = theirs.pool_start(prefix)
    most = len(whole) - 3
    kept = ours.encode(text, prefix, max_tokens=most, truncate=truncate).ids.tolist()
    cut = theirs.encode(text, prefix, max_tokens=most, truncate=truncate).ids.tolist()
    ids = whole.ids.tolist()
    if truncate is Truncation.END:
        assert kept == [*ids[: most - 1], 2]
        assert cut == ids[:most]
    else:
        assert kept == cut == ids[:skipped] + ids[skipped + 3 :]


def test_the_template_is_the_rows() -> None:
    assert TOY.prompt("query", "{x}") == Prompt(("Task: {x}\nText: ",))
    assert TOY.prompt("passage") == TOY.prompt("query") == Prompt()
    assert query_prefix("find") == "Instruct: find\nQuery: "


def test_which_rows_are_pooled() -> None:
    assert (NV_EMBED.pooled, TOY.pooled) == ("text", "last")
    mean = replace(NV_EMBED, pooler="mean", left_out="nothing")
    assert mean.pooled == "all"
    given = encodings()
    text, every, last = (pack(given, CPU, pooled=how) for how in ("text", "all", "last"))
    assert text.pooled.lengths == (5, 13, 1, 32)
    assert (every.pool_rows, every.pooled.lengths) == (None, (5, 33, 64, 33))
    assert last.pool_rows is not None
    assert last.pool_rows.tolist() == [4, 37, 101, 134]


def test_the_batch_carries_a_plan_for_each_kind_of_queries() -> None:
    asked = []
    batch = pack(encodings(), CPU, filler=True, planner=lambda *rows: asked.append(rows) or "plan")
    assert (batch.seqs.plan, batch.pooled.plan) == ("plan", "plan")
    rows = [(q.lengths, k.lengths, q_rows, k_rows) for q, k, q_rows, k_rows in asked]
    whole, chosen = (5, 33, 64, 33), (5, 13, 1, 32)
    assert batch.pool_rows is not None
    assert rows == [
        (whole, whole, batch.num_tokens, batch.num_tokens),
        (chosen, whole, len(batch.pool_rows), batch.num_tokens),
    ]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    """In float32 on the CPU, which tests/server/engine/test_families.py compares with others'."""
    return ModelRunner(RunnerOptions(str(checkpoint), dtype="float32")).embed(encodings())


@pytest.mark.whole
@needs_varlen
@pytest.mark.parametrize(
    ("attention", "graphs"),
    [("varlen", False), ("varlen", True), ("padded", False), ("sdpa", False)],
)
def test_a_causal_family_on_an_emulated_gpu(
    checkpoint: Path, expected: np.ndarray, attention: str, graphs: bool
) -> None:
    with emulated((9, 0)):
        runner = ModelRunner(
            RunnerOptions(
                str(checkpoint),
                device="cuda",
                attention=attention,
                cuda_graphs=graphs,
                max_batch_tokens=256,
                max_input_tokens=300,
            )
        )
        runner.warm_up()
        assert (runner.info.attention, runner.info.cuda_graphs) == (attention, graphs)
        rows = runner.embed(encodings())
        runner.close()
    assert ((rows * expected).sum(axis=1) > IN_16_BITS).all()


def test_the_mask_shows(
    checkpoint: Path, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the other one the vectors are far from these, so that the comparisons here tell."""
    monkeypatch.setattr(families, "FAMILIES", [replace(TOY, mask="full")])
    rows = ModelRunner(RunnerOptions(str(checkpoint), dtype="float32")).embed(encodings())
    assert ((rows * expected).sum(axis=1) < 0.97).all()


def test_in_bfloat16_on_the_cpu(checkpoint: Path, expected: np.ndarray) -> None:
    """Where lengths are rounded up: under a causal mask, too, that changes nothing."""
    runner = ModelRunner(RunnerOptions(str(checkpoint), dtype="bfloat16"))
    together = runner.embed(encodings())
    alone = np.concatenate([runner.embed([encoding]) for encoding in encodings()])
    for rows in (together, alone):
        assert ((rows * expected).sum(axis=1) > IN_16_BITS).all()


def test_another_familys_tensors_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    raw = {**CONFIG, "num_hidden_layers": 2}
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="not those of a toy model of this config: surplus"):
        ModelRunner(RunnerOptions(str(tmp_path), dtype="float32"))
