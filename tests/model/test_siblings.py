"""Parity of the sibling families with their authors' code, on checkpoints rebuilt from recipes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.batch import Encoding, RunnerOptions
from model.encoder import Encoder
from model.errors import EmptyPoolError
from model.families import Family
from model.prompts import Example, Prompt
from model.runner import ModelRunner
from model.tokenizer import Truncation
from tests.model.emulated_cuda import emulated
from tests.model.torches import HAS_VARLEN
from tests.siblings import MARKERS, SIBLINGS, golden_cases, write_sibling

LITERAL = ("<s>", "</s>", "<unk>")
"""In a user's text: text here, and ids of their own in the authors' code; as bge-en-icl's markers
are there."""
CASES = [(name, case) for name in SIBLINGS for case in golden_cases(name)]
COUNTS = dict(zip(SIBLINGS, (99, 90, 95, 132, 90, 95), strict=True))
LEFT_OUT = dict(zip(SIBLINGS, (13, 13, 12, 21, 12, 12), strict=True))
EACH_CASE = pytest.mark.parametrize(
    ("name", "case"), CASES, ids=[f"{name}: {case['name']}" for name, case in CASES]
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(set, keys of config.json that are other ones) -> its encoder in float32."""

    @cache
    def written(name: str, config: str) -> Encoder:
        folder = tmp_path_factory.mktemp("siblings") / name
        write_sibling(folder, name, json.loads(config))
        return Encoder(folder, device="cpu", dtype="float32")

    return lambda name, config: written(name, json.dumps(config or {}))


def prompt_of(family: Family, case: dict[str, Any]) -> Prompt:
    """By the family's own template, not by the strings that the case holds."""
    if case["side"] == "raw":
        return family.verbatim("")
    if case.get("road") == "direct":
        return family.verbatim(case["prefix"], case["suffix"])
    examples = [
        Example(e["instruct"], e["query"], e["response"]) for e in case.get("examples") or ()
    ]
    return family.prompt(case["side"], case["task"] or "", examples)


def usable(name: str, case: dict[str, Any]) -> list[int]:
    """Indices of texts without a literal special token."""
    literal = (*LITERAL, *MARKERS) if name == "bge-en-icl" else LITERAL
    texts = case["texts"]
    return [i for i, text in enumerate(texts) if not any(token in text for token in literal)]


@EACH_CASE
def test_the_same_token_ids(name: str, case: dict[str, Any], encoder: Any) -> None:
    tokenizer = encoder(name, case.get("config")).tokenizer
    prompt = prompt_of(tokenizer.family, case)
    for i in usable(name, case):
        (result,) = tokenizer.encode_batch(
            [case["texts"][i]], prompt, max_tokens=case["max_length"], truncate=Truncation.END
        )
        if case["embeddings"][i] is None:
            assert isinstance(result, EmptyPoolError), case["texts"][i]
            continue
        assert isinstance(result, Encoding), result
        assert result.ids.tolist() == case["token_ids"][i], case["texts"][i]
        pooled = len(result) - 1 if tokenizer.family.pooled == "last" else result.pool_start
        assert pooled == case["pool_from"][i], case["texts"][i]


@pytest.mark.whole
@EACH_CASE
def test_the_same_vectors(name: str, case: dict[str, Any], encoder: Any) -> None:
    """Each text alone, and all packed together in another order."""
    ours = encoder(name, case.get("config"))
    prompt = prompt_of(ours.tokenizer.family, case)
    chosen = [i for i in usable(name, case) if case["embeddings"][i] is not None]
    if not chosen:
        pytest.skip("the authors' code gives no vector here: 0/0")
    expected = np.array([case["embeddings"][i] for i in chosen])

    def vectors(texts: list[str]) -> np.ndarray:
        limit = case["max_length"]
        found = ours.encode(texts, prompt, max_tokens=limit, truncate=Truncation.END)
        return np.asarray(found)

    texts = [case["texts"][i] for i in chosen]
    alone = np.concatenate([vectors([text]) for text in texts])
    np.testing.assert_allclose(alone, expected, rtol=0, atol=1e-5)
    packed = vectors(texts[::-1])[::-1]
    np.testing.assert_allclose(packed, expected, rtol=0, atol=1e-5)


def test_what_is_left_out() -> None:
    """Only texts with a literal special token; tests/golden/README.md lists them."""
    texts = {n: sum(len(case["texts"]) for case in golden_cases(n)) for n in SIBLINGS}
    kept = {n: sum(len(usable(n, case)) for case in golden_cases(n)) for n in SIBLINGS}
    assert texts == COUNTS
    assert {n: texts[n] - kept[n] for n in SIBLINGS} == LEFT_OUT


def test_the_rebuilt_checkpoint_is_the_recipes(tmp_path: Path) -> None:
    folder = write_sibling(tmp_path / "e5", "e5-mistral")
    assert sorted(path.name for path in folder.iterdir()) == [
        "1_Pooling",
        "config.json",
        "config_sentence_transformers.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


TEXTS = ["x", "how long is a river?", "The committee met twice, and agreed on nothing. " * 9]


@pytest.mark.whole
@pytest.mark.parametrize("name", SIBLINGS)
@pytest.mark.parametrize(
    ("dtype", "quantization", "least"),
    [("bfloat16", "none", 0.995), ("float32", "int8-dynamic", 0.99)],
)
def test_in_low_precision(
    name: str, dtype: str, quantization: str, least: float, encoder: Any, tmp_path: Path
) -> None:
    """Near float32's, and in float32's products the same alone and together."""
    exact = encoder(name, None)
    prompt = exact.tokenizer.family.prompt("query")
    low = Encoder(
        write_sibling(tmp_path / name, name),
        device="cpu",
        dtype=dtype,
        quantization=quantization,
        cpu_products="allow-slow",
    )
    together = low.encode(TEXTS, prompt)
    cosines = (exact.encode(TEXTS, prompt) * together).sum(axis=1)
    assert cosines.min() > least, cosines
    alone = np.concatenate([low.encode([text], prompt) for text in TEXTS])
    assert (alone * together).sum(axis=1).min() > 0.9995


@pytest.mark.whole
@pytest.mark.skipif(not HAS_VARLEN, reason="this torch has no varlen_attn")
@pytest.mark.parametrize("name", SIBLINGS)
def test_on_an_emulated_gpu(name: str, encoder: Any, tmp_path: Path) -> None:
    """bfloat16 by the kernels of a GPU, recorded and eager; a window that is shorter than texts."""
    window = {"sliding_window": 32} if SIBLINGS[name].family == "e5-mistral" else None
    exact = encoder(name, window)
    prompt = exact.tokenizer.family.prompt("query")
    encodings = [exact.tokenizer.encode(text, prompt, max_tokens=512) for text in TEXTS]
    expected = exact.embed(encodings)
    folder = write_sibling(tmp_path / name, name, window)
    for graphs in (False, True):
        with emulated((9, 0)):
            runner = ModelRunner(
                RunnerOptions(
                    str(folder),
                    device="cuda",
                    cuda_graphs=graphs,
                    max_batch_tokens=256,
                    max_input_tokens=256,
                )
            )
            runner.warm_up()
            assert (runner.info.attention, runner.info.cuda_graphs) == ("varlen", graphs)
            rows = np.concatenate([runner.embed(encodings), runner.embed(encodings[:1])])
            runner.close()
        assert (rows[:3] * expected).sum(axis=1).min() > 0.995
        assert rows[3] @ expected[0] > 0.995
