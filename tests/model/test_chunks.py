"""Late chunks: which tokens each holds, and each vector by a formula of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Encoding, RunnerOptions, num_tokens
from model.chunks import Chunks, ChunksError, own_places
from model.config import ModelConfig
from model.errors import InputTooLongError, UnsupportedError
from model.fitting import FittingRunner
from model.prompts import NO_PROMPT, Prompt
from model.runner import ModelRunner
from model.tokenizer import NVEmbedTokenizer, query_prefix
from model.verify.referee import Referee
from model.weights.checkpoint import Checkpoint
from tests.model.test_poolers import published_pooler
from tests.siblings import write_sibling

TEXT = "The  committee met twice,\nand agreed on nothing. Ünïcode 🙂 ends it; a river runs by. Fin"
RUNS = ((0, 25), (25, 48), (49, 89), (10, 60))
CHUNKS = [Chunks("size", size=7), Chunks("characters", runs=RUNS), Chunks("size", size=1000)]


def runner_of(folder: Path) -> ModelRunner:
    return ModelRunner(RunnerOptions(str(folder), dtype="float32", threads=1))


def by_formula(folder: Path, encodings: list[Encoding]) -> np.ndarray:
    """transformers' layers over the whole input, the authors' pooler in float64 over each run."""
    config = ModelConfig.from_dir(folder)
    referee = Referee(folder, config, torch.device("cpu"))
    checkpoint = Checkpoint(folder)
    checkpoint.check(config)
    with torch.inference_mode():
        (states,) = referee._hidden_states(checkpoint, [Encoding(encodings[0].ids)])
    vectors = []
    for encoding in encodings:
        assert encoding.span is not None
        rows = states[encoding.pool_start : encoding.span.end].double()
        pooled = (
            published_pooler(rows, config) if config.family.pooler == "latent" else rows.mean(0)
        )
        vectors.append((pooled / pooled.norm()).numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module", params=["nv-embed", "gritlm"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the latent pooler, and one that pools by a mean."""
    if request.param == "nv-embed":
        golden: Path = request.getfixturevalue("golden_checkpoint")
        return golden
    return write_sibling(tmp_path_factory.mktemp("chunks") / "gritlm", "gritlm")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> NVEmbedTokenizer:
    return NVEmbedTokenizer.from_dir(folder)


def prompts(tokenizer: NVEmbedTokenizer) -> list[Prompt]:
    return [NO_PROMPT, tokenizer.family.prompt("query", "find it")]


@pytest.mark.parametrize("chunks", CHUNKS, ids=["by 7", "characters", "one"])
def test_each_is_the_mean_over_its_rows(
    folder: Path, tokenizer: NVEmbedTokenizer, chunks: Chunks
) -> None:
    runner = runner_of(folder)
    for prompt in prompts(tokenizer):
        encodings = tokenizer.spans(TEXT, prompt, chunks, max_tokens=512)
        expected = by_formula(folder, encodings)
        np.testing.assert_allclose(runner.embed(encodings), expected, rtol=0, atol=1e-5)
        # Among others in one batch, which it leaves as they are.
        others = [tokenizer.encode(text, prompt, max_tokens=512) for text in ("a", TEXT * 3)]
        alone = runner.embed(others)
        mixed = runner.embed([others[0], *encodings, others[1], *encodings[:1]])
        np.testing.assert_allclose(mixed[1 : 1 + len(encodings)], expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(mixed[[0, -2]], alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(mixed[-1], expected[0], rtol=0, atol=1e-5)


def test_they_are_one_sequence(folder: Path, tokenizer: NVEmbedTokenizer) -> None:
    encodings = tokenizer.spans(TEXT, NO_PROMPT, Chunks("size", size=3), max_tokens=512)
    whole = tokenizer.encode(TEXT, max_tokens=512)
    assert len(encodings) > 5
    assert all(encoding.ids is encodings[0].ids for encoding in encodings)
    assert encodings[0].ids.tolist() == whole.ids.tolist()
    assert num_tokens(encodings) == len(whole)
    assert len({encoding.key for encoding in [*encodings, whole]}) == len(encodings) + 1


def test_halved_for_lack_of_memory_they_are_the_same(
    folder: Path, tokenizer: NVEmbedTokenizer
) -> None:
    encodings = tokenizer.spans(TEXT, NO_PROMPT, Chunks("size", size=5), max_tokens=512)
    runner = runner_of(folder)
    whole = runner.embed(encodings)

    class Small:
        """Too small for more than two vectors."""

        info = runner.info

        def embed(self, batch: list[Encoding]) -> np.ndarray:
            if len(batch) > 2:
                raise MemoryError
            return runner.embed(batch)

    rows, lost = FittingRunner(Small()).embed(encodings)  # type: ignore[arg-type]
    assert not lost
    np.testing.assert_allclose(rows, whole, rtol=0, atol=1e-5)


def test_runs_of_characters_hold_whole_words(golden_checkpoint: Path) -> None:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    text = "one two  three"
    runs = ((0, 3), (3, 7), (4, 7), (7, 14), (0, 14))
    found = tokenizer.spans(text, NO_PROMPT, Chunks("characters", runs=runs), max_tokens=64)
    spans = [encoding.span for encoding in found]
    shown = [text[slice(*span.characters)].strip() for span in spans if span is not None]
    assert shown == ["one", "two", "two", "three", text]
    assert found[0].span is not None
    assert found[0].span.tokens[0] == 0


def test_sizes_cover_a_text_without_overlap(golden_checkpoint: Path) -> None:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    prompt = tokenizer.family.verbatim(query_prefix("find it"))
    found = tokenizer.spans(TEXT, prompt, Chunks("size", size=4), max_tokens=512)
    runs = [encoding.span.tokens for encoding in found if encoding.span is not None]
    assert [first for first, _ in runs] == list(range(0, 4 * len(runs), 4))
    assert [end for _, end in runs[:-1]] == [first for first, _ in runs[1:]]
    assert runs[-1][1] == len(found[0].ids) - found[0].pool_start - 1, "all but EOS"


@pytest.mark.parametrize(
    ("chunks", "index"),
    [
        (Chunks("tokens", runs=((0, 2), (3, 99))), 1),
        (Chunks("tokens", runs=((-1, 2),)), 0),
        (Chunks("characters", runs=((0, 3), (4, 5), (900, 901))), 2),
        (Chunks("characters", runs=((3, 4),)), 0),
        (Chunks("characters", runs=((-2, 4),)), 0),
    ],
)
def test_a_run_that_is_not_there(golden_checkpoint: Path, chunks: Chunks, index: int) -> None:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    with pytest.raises(ChunksError) as caught:
        tokenizer.spans("one two three", NO_PROMPT, chunks, max_tokens=64)
    assert caught.value.index == index


def test_what_has_no_chunks(golden_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    with pytest.raises(InputTooLongError):
        tokenizer.spans("word " * 99, NO_PROMPT, Chunks("size", size=8), max_tokens=64)
    last = NVEmbedTokenizer.from_dir(write_sibling(tmp_path / "e5", "e5-mistral"))
    with pytest.raises(UnsupportedError, match="one row"):
        last.spans("one two", NO_PROMPT, Chunks("size", size=8), max_tokens=64)


def test_places_never_go_back() -> None:
    """Pieces of one character share its offsets; a piece of spaces alone has its last one."""
    places = own_places([(2, 4), (4, 6), (4, 6), (6, 8)], "x:  ab  ", 2, 6)
    assert [place.anchor for place in places] == [1, 2, 2, 5]
    assert [place.end for place in places] == [2, 4, 4, 6]
