"""The buffers and the bookkeeping, with a recorder that runs everything again on the same tensors
in place of CUDA's. Recordings on a GPU: `make gpu-check`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from model import cuda_graphs, poolers
from model.attention.cpu import sdpa_by_length
from model.attention.kernels import choose_kernel
from model.batch import Encoding, RunnerOptions
from model.config import ModelConfig
from model.embedder import Embedder
from model.errors import UnsupportedError
from model.packing import PackedBatch, Segments, pack
from model.runner import ModelRunner
from model.weights.loader import empty_model, load_model
from tests.model.test_attention import segments
from tests.model.torches import HAS_VARLEN

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(golden_config: ModelConfig, golden_checkpoint) -> Embedder:  # type: ignore[no-untyped-def]
    return load_model(golden_checkpoint, golden_config, device=CPU, dtype=torch.float32)


def by_bounds(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """As the kernels on CUDA: bounds from the tensors, empty sequences allowed, and rows of no
    sequence are left as they were: here NaN."""
    assert not causal
    q_bounds, k_bounds = queries.cu_seqlens.tolist(), keys.cu_seqlens.tolist()
    out = torch.full_like(q, torch.nan)
    for i in range(len(q_bounds) - 1):
        rows, others = slice(*q_bounds[i : i + 2]), slice(*k_bounds[i : i + 2])
        if rows.stop > rows.start:
            one, other = segments([rows.stop - rows.start]), segments([others.stop - others.start])
            out[rows] = sdpa_by_length(q[rows].clone(), k[others], v[others], one, other)
    return out


@pytest.fixture
def graphed(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> cuda_graphs.GraphedForward:
    def on_bounds(x: Tensor, pooled: Segments) -> Tensor:
        """segment_mean as it runs on CUDA."""
        lengths = pooled.cu_seqlens.diff()
        return torch.segment_reduce(x.float(), "mean", lengths=lengths, axis=0, unsafe=True)

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def again() -> Tensor:
            with monkeypatch.context() as patched:
                patched.setattr(poolers, "segment_mean", on_bounds)
                return run()

        again()  # finds an empty batch in the buffers, as CUDA's recorder does
        return again

    with torch.inference_mode():
        return cuda_graphs.GraphedForward(lambda batch: model(batch, by_bounds), CPU, record)


def encoding(length: int, pool_start: int = 0) -> Encoding:
    return Encoding((np.arange(length, dtype=np.int32) * 7 + length) % 90 + 3, pool_start)


def test_a_replay_is_the_forward(graphed: cuda_graphs.GraphedForward, model: Embedder) -> None:
    """One recording after another, larger and smaller, so that nothing of the last one stays."""
    with torch.inference_mode():
        for lengths in ([200, 40], [5], [17, 3, 9], [64], [1] * 16, [30, 2], [16]):
            batch = [encoding(length, length // 3) for length in lengths]
            rows = graphed(batch)
            assert rows is not None
            expected = model(pack(batch, CPU), sdpa_by_length)
            torch.testing.assert_close(rows, expected, atol=1e-5, rtol=0)


def test_what_is_too_large_is_left_to_the_others(graphed: cuda_graphs.GraphedForward) -> None:
    assert graphed([encoding(cuda_graphs.SIZES[-1] + 1)]) is None
    assert graphed([encoding(2)] * (cuda_graphs.MAX_SEQS + 1)) is None


def test_no_recording_is_of_one_token() -> None:
    """FlashAttention fails with 1 as the longest sequence beside empty ones."""
    assert min(cuda_graphs.SIZES) >= 2


def test_auto_is_where_it_can_be() -> None:
    cuda = torch.device("cuda", 0)
    for graphs, device, kernel, quantization, expected in (
        ("auto", cuda, "varlen", "float8", True),
        ("auto", cuda, "padded", "none", False),
        ("auto", cuda, "varlen", "int8", False),
        ("auto", CPU, "sdpa", "none", False),
        (False, cuda, "varlen", "none", False),
        (True, cuda, "varlen", "none", True),
    ):
        assert cuda_graphs.wanted(graphs, device, kernel, quantization) is expected  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="need a GPU"):
        cuda_graphs.wanted(True, CPU, "sdpa", "none")


def test_what_cannot_be_recorded_is_refused(golden_checkpoint) -> None:  # type: ignore[no-untyped-def]
    cuda = torch.device("cuda", 0)
    cuda_graphs.check(cuda, "varlen", "float8")
    with pytest.raises(UnsupportedError, match="flash-attn or varlen"):
        cuda_graphs.check(cuda, "padded", "none")
    with pytest.raises(UnsupportedError, match=r"LLM\.int8"):
        cuda_graphs.check(cuda, "varlen", "int8")
    with pytest.raises(UnsupportedError, match="need a GPU"):
        ModelRunner(RunnerOptions(str(golden_checkpoint), cuda_graphs=True))


@pytest.mark.skipif(not HAS_VARLEN, reason="this torch has no varlen_attn")
def test_meta_tensors_run_through_a_recording(golden_config: ModelConfig) -> None:
    """The buffers' views have the shapes and dtypes that the real varlen kernel wants."""
    meta = torch.device("meta")
    model = empty_model(golden_config, dtype=torch.bfloat16)
    _, attend = choose_kernel("varlen", meta, torch.bfloat16)
    seen: list[PackedBatch] = []

    def forward(batch: PackedBatch) -> Tensor:
        seen.append(batch)
        rows: Tensor = model(batch, attend)
        assert rows.shape == (cuda_graphs.MAX_SEQS + 1, golden_config.hidden_size)
        return rows

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        run()
        return run

    with torch.inference_mode():
        cuda_graphs.GraphedForward(forward, meta, record)
    assert [batch.num_tokens for batch in seen] == sorted(cuda_graphs.SIZES, reverse=True)
    for batch in seen:
        assert batch.seqs.cu_seqlens.dtype == torch.int32
        assert batch.seqs.cu_seqlens.shape == (cuda_graphs.MAX_SEQS + 2,)
        assert batch.pool_rows is not None
        assert batch.pool_rows.shape == batch.input_ids.shape
