from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.batch import BatchLimits, Encoding, RunnerInfo
from model.encoder import Encoder, batches_by_length
from model.errors import EmptyPoolError, InputTooLongError, NonFiniteError
from model.tokenizer import NVEmbedTokenizer, Truncation, query_prefix

PREFIX = query_prefix("Retrieve semantically similar text")
WORDS = ["alpha", "beta", "gamma", "delta", "épsilon", "🙂", "zeta", "eta", "theta"]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


class IdRunner:
    """Each row holds its input's length and last-but-one id; remembers the batches it saw."""

    info = RunnerInfo("cpu", "fake", "float32", "none", "none", width=2)

    def __init__(self, poison: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.poison = poison  # an input of this many tokens gives NaN

    def embed(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        self.batches.append([len(e) for e in encodings])
        rows = np.array([[len(e), e.ids[-2]] for e in encodings], dtype=np.float32)
        rows[rows[:, 0] == self.poison] = np.nan
        return rows

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


def test_a_vector_depends_on_its_text_alone(golden_encoder: Encoder) -> None:
    inputs = texts(40)
    together = golden_encoder.encode(inputs, PREFIX)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    shuffled = random.Random(1).sample(range(40), 40)
    reordered = golden_encoder.encode([inputs[i] for i in shuffled], PREFIX)
    np.testing.assert_allclose(reordered, together[shuffled], rtol=0, atol=1e-5)
    alone = np.concatenate([golden_encoder.encode([text], PREFIX) for text in inputs])
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-5)


def test_the_instruction_changes_the_vector(golden_encoder: Encoder) -> None:
    bare, instructed = golden_encoder.encode(["x y"]), golden_encoder.encode(["x y"], PREFIX)
    assert np.abs(bare - instructed).max() > 1e-2


def test_the_order_is_restored_and_the_limits_kept(tokenizer: NVEmbedTokenizer) -> None:
    runner = IdRunner()
    limits = BatchLimits(max_tokens=100, max_seqs=8)
    encoder = Encoder.of(tokenizer, runner, limits, max_tokens=4096)
    inputs = [*texts(100), "long " * 300]
    vectors = encoder.encode(inputs, progress=False)
    expected = [tokenizer.encode(text, max_tokens=4096).ids for text in inputs]
    assert vectors.tolist() == [[len(ids), ids[-2]] for ids in expected]
    assert runner.batches[0] == [303], "longer than a batch: alone"
    assert all(len(batch) == 1 or sum(batch) <= 100 for batch in runner.batches)
    assert all(len(batch) <= 8 for batch in runner.batches)
    assert encoder.encode([]).shape == (0, 2)


@given(
    lengths=st.lists(st.integers(1, 60), max_size=60),
    max_tokens=st.integers(1, 100),
    max_seqs=st.integers(1, 10),
)
def test_batches_lose_nothing_and_keep_the_limits(
    lengths: list[int], max_tokens: int, max_seqs: int
) -> None:
    encodings = [Encoding(np.ones(n, dtype=np.int32)) for n in lengths]
    batches = batches_by_length(encodings, BatchLimits(max_tokens, max_seqs))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_seqs
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_a_non_finite_vector_is_an_error_that_names_its_text(tokenizer: NVEmbedTokenizer) -> None:
    encoder = Encoder.of(tokenizer, IdRunner(poison=5), BatchLimits(100, 8), max_tokens=4096)
    with pytest.raises(NonFiniteError) as error:
        encoder.encode(["one", "one two three", "one two", "four five six"])
    assert sorted(error.value.rows) == [1, 3]


def test_a_refused_text_is_named(tokenizer: NVEmbedTokenizer) -> None:
    encoder = Encoder.of(tokenizer, IdRunner(), BatchLimits(100, 8), max_tokens=16)
    with pytest.raises(InputTooLongError) as error:
        encoder.encode(["short", "one two three " * 9, "short"])
    assert error.value.__notes__ == ["in texts[1]"]
    cut = encoder.encode(["one two three " * 9], truncate=Truncation.END)
    assert cut[0, 0] == 16
    with pytest.raises(EmptyPoolError) as empty:
        encoder.encode(["short"], PREFIX, max_tokens=14, truncate=Truncation.END)
    assert empty.value.__notes__ == ["in texts[0]"]
