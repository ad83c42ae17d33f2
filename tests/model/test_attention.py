"""The kernels against each other, and the CUDA branch as far as a machine without one can go.

Meta tensors run it whole (shapes, dtypes); FakeTensorMode with device="cuda" checks placement
around the attention front only: a CPU build refuses more. Numbers on a GPU: `make gpu-check`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.attention import cpu
from model.attention.cpu import Plan, planner, sdpa_by_length
from model.attention.kernels import (
    KERNEL_NAMES,
    AttentionKernel,
    available_kernels,
    choose_kernel,
    flash_attn_kernel,
    sdpa_padded,
    varlen_kernel,
)
from model.errors import UnsupportedError
from model.packing import Segments
from model.training.attention import grouped_products
from tests.model.torches import HAS_VARLEN, VARLEN

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")


def segments(lengths: list[int], device: torch.device = CPU) -> Segments:
    bounds = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    if device.type != "cpu":
        bounds = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
    return Segments(tuple(lengths), bounds, max(lengths))


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """softmax(q·kᵀ / sqrt(E))·v, head by head and sequence by sequence, in float64; causal: under a
    mask that is written out, the queries being the last rows."""
    out, q_at, k_at = torch.empty_like(q), 0, 0
    for q_len, k_len in zip(queries.lengths, keys.lengths, strict=True):
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            q_rows = q[q_at : q_at + q_len, head].double()
            k_rows = k[k_at : k_at + k_len, group].double()
            v_rows = v[k_at : k_at + k_len, group].double()
            scores = q_rows @ k_rows.T / math.sqrt(q.shape[-1])
            if causal:
                places = torch.arange(k_len)
                own = places[k_len - q_len :, None]
                scores = scores.masked_fill(places[None] > own, -torch.inf)
                if window is not None:
                    scores = scores.masked_fill(places[None] <= own - window, -torch.inf)
            weights = scores.softmax(-1)
            out[q_at : q_at + q_len, head] = weights @ v_rows
        q_at, k_at = q_at + q_len, k_at + k_len
    return out


def fake_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = True,  # not flash-attn's default: that ours says False must show
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """flash_attn_varlen_func's parameters, the naive sum."""
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k)
    left, right = window_size
    assert right == (0 if left >= 0 else -1)
    window = left + 1 if left >= 0 else None
    return naive(q, k, v, segments(queries), segments(keys), causal=causal, window=window)


def new_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch 2.11's parameters: grouped queries have to be asked for, a causal mask is a window."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0 or window_size == (-1, -1)
    left, right = window_size
    return fake_flash(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        causal=right == 0, window_size=(left, 0 if left >= 0 else -1),
    )  # fmt: skip


def old_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    """torch 2.10's parameters: as many key heads as query heads."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return fake_flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=is_causal)


def newest_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    num_splits: int | None = None,
) -> Tensor:
    """torch 2.13's parameters: None lets it split keys by how many there are."""
    assert num_splits == 1
    return new_varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        window_size=window_size, enable_gqa=enable_gqa,
    )  # fmt: skip


KERNELS = {
    "sdpa": sdpa_by_length,
    "padded": sdpa_padded,
    "flash-attn": flash_attn_kernel(fake_flash),
    "varlen": varlen_kernel(newest_varlen),
    "varlen, torch 2.11": varlen_kernel(new_varlen),
    "varlen, older torch": varlen_kernel(old_varlen),
    "of training": grouped_products,
}


def random_heads(
    heads: int, kv_heads: int, queries: Segments, keys: Segments, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(queries.lengths), heads, 8, generator=generator)
    k, v = torch.randn(2, sum(keys.lengths), kv_heads, 8, generator=generator)
    return q, k, v


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "lengths",
    [[1], [7], [5, 5, 5], [3, 3, 9, 1, 1, 4], [1, 30, 2, 30]],
    ids=str,
)
def test_every_kernel_computes_the_same(
    kernel: AttentionKernel, kv_heads: int, lengths: list[int], causal: bool
) -> None:
    seqs = segments(lengths)
    q, k, v = random_heads(4, kv_heads, seqs, seqs)
    out = kernel(q, k, v, seqs, seqs, causal=causal)
    torch.testing.assert_close(out, naive(q, k, v, seqs, seqs, causal=causal), rtol=0, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)), min_size=1, max_size=12),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
)
def test_every_kernel_on_any_pooled_subset(
    lengths: list[tuple[int, int]], kv_heads: int, causal: bool
) -> None:
    """As in the last layer: the queries are the rows after each sequence's instruction."""
    keys = segments([length for length, _ in lengths])
    queries = segments([length - min(start, length - 1) for length, start in lengths])
    q, k, v = random_heads(4, kv_heads, queries, keys)
    expected = naive(q, k, v, queries, keys, causal=causal)
    for name, kernel in KERNELS.items():
        out = kernel(q, k, v, queries, keys, causal=causal)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("kernel", [sdpa_by_length, sdpa_padded])
def test_sequences_do_not_see_each_other(kernel: AttentionKernel) -> None:
    seqs = segments([4, 6])
    q, k, v = random_heads(4, 2, seqs, seqs)
    before = kernel(q, k, v, seqs, seqs)[:4]
    k[4:], v[4:] = 9.0, float("inf")
    after = kernel(q, k, v, seqs, seqs)[:4]
    if kernel is sdpa_by_length:
        assert torch.equal(before, after)
    assert torch.isfinite(after).all()


# -- the CUDA branch -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VARLEN, "padded", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_cuda_branch_on_meta_tensors(name: str, dtype: torch.dtype, causal: bool) -> None:
    queries, keys = segments([10, 22], META), segments([28, 40], META)
    q = torch.empty(32, 32, 128, dtype=dtype, device=META)
    k, v = torch.empty(2, 68, 8, 128, dtype=dtype, device=META)
    chosen, kernel = choose_kernel(name, META, dtype)
    out = kernel(q, k, v, queries, keys, causal=causal)
    assert chosen == name
    assert (out.shape, out.dtype, out.device.type) == ((32, 32, 128), dtype, "meta")


def test_the_varlen_front_stays_on_the_gpu() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    kernel = varlen_kernel(varlen.varlen_attn)
    with FakeTensorMode():
        seqs = segments([28, 40], CUDA)
        q = torch.empty(68, 32, 128, dtype=torch.bfloat16, device=CUDA)
        k = torch.empty(68, 8, 128, dtype=torch.bfloat16, device=CUDA)
        out = kernel(q, k, k.clone(), seqs, seqs)
    assert (out.shape, out.dtype, out.device) == ((68, 32, 128), torch.bfloat16, CUDA)


# -- the choice ------------------------------------------------------------------------------


def test_auto() -> None:
    assert choose_kernel("auto", CPU, torch.float32) == ("sdpa", sdpa_by_length)
    assert choose_kernel("auto", CPU, torch.bfloat16) == ("sdpa", sdpa_by_length)
    # A CUDA device in float32: no varlen kernel takes it.
    assert choose_kernel("auto", META, torch.float32) == ("padded", sdpa_padded)
    fastest = ("flash-attn", "varlen") if HAS_VARLEN else ("flash-attn", "padded")
    assert choose_kernel("auto", META, torch.bfloat16)[0] in fastest


@pytest.mark.parametrize(
    ("name", "device", "dtype", "reason"),
    [
        ("varlen", META, torch.float32, "needs float16 or bfloat16, not float32"),
        ("varlen", CPU, torch.bfloat16, "runs on CUDA only"),
        # First what nothing can change: no other type and no package would help here.
        ("varlen", CPU, torch.float32, "runs on CUDA only"),
        ("flash-attn", CPU, torch.bfloat16, "runs on CUDA only"),
        ("flash-attn", CPU, torch.float32, "runs on CUDA only"),
        ("flash-attn", META, torch.float32, "needs float16 or bfloat16, not float32"),
        ("fast", CPU, torch.float32, "known: auto, varlen, flash-attn, padded, sdpa"),
    ],
)
def test_a_kernel_that_cannot_run_says_why(
    name: str, device: torch.device, dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        choose_kernel(name, device, dtype)


def test_an_old_gpu_gets_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert available_kernels(CUDA, torch.float16) == ["padded", "sdpa"]
    with pytest.raises(UnsupportedError, match=r"8\.0 \(Ampere\)"):
        choose_kernel("varlen", CUDA, torch.float16)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder `flash_attn` that can be imported from."""
    folder = tmp_path / "flash_attn"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    sys.modules.pop("flash_attn", None)


def test_flash_attn_4_is_not_taken_for_flash_attn(flash_attn: Path) -> None:
    """Its wheel has flash_attn/cute and no flash_attn/__init__.py: what is imported is empty."""
    (flash_attn / "cute").mkdir()
    (flash_attn / "cute" / "__init__.py").touch()
    assert "flash-attn" not in available_kernels(META, torch.bfloat16)
    assert choose_kernel("auto", META, torch.bfloat16)[0] != "flash-attn"
    with pytest.raises(UnsupportedError, match="installed as flash_attn is another package"):
        choose_kernel("flash-attn", META, torch.bfloat16)


def test_flash_attn_is_behind_torchs_own(flash_attn: Path) -> None:
    (flash_attn / "__init__.py").write_text("def flash_attn_varlen_func(): ...")
    names = available_kernels(META, torch.bfloat16)
    assert "flash-attn" in names
    if "varlen" in names:
        assert names[0] == "varlen"
    assert choose_kernel("flash-attn", META, torch.bfloat16)[0] == "flash-attn"


def test_a_flash_attn_that_cannot_be_imported_says_why(flash_attn: Path) -> None:
    (flash_attn / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    with pytest.raises(UnsupportedError, match="cannot be imported: undefined symbol"):
        choose_kernel("flash-attn", META, torch.bfloat16)


def test_what_runs_here() -> None:
    assert available_kernels(CPU, torch.float32) == ["padded", "sdpa"]
    assert set(KERNEL_NAMES) == {"flash-attn", "varlen", "padded", "sdpa"}


def test_the_naive_sum_is_scaled_dot_product_attention() -> None:
    seqs = segments([6])
    q, k, v = random_heads(4, 4, seqs, seqs)
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)))
    torch.testing.assert_close(naive(q, k, v, seqs, seqs), theirs.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 39)), min_size=1, max_size=6),
    round_to=st.sampled_from([1, 16]),
    causal=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_lengths_rounded_up_change_nothing(
    dtype: torch.dtype, lengths: list[tuple[int, int]], round_to: int, causal: bool
) -> None:
    key_lengths = [length for length, _ in lengths]
    query_lengths = [max(1, length - left_out) for length, left_out in lengths]
    keys, queries = segments(key_lengths), segments(query_lengths)
    q, k, v = (x.to(dtype) for x in random_heads(4, 2, queries, keys))
    filled = [torch.cat([x, x[-1:].expand(-len(x) % round_to, -1, -1)]) for x in (q, k, v)]
    plan = planner(dtype, causal=causal)(queries, keys, len(filled[0]), len(filled[1]))
    out = sdpa_by_length(*filled, queries, keys, causal=causal)
    again = sdpa_by_length(*filled, replace(queries, plan=plan), keys, causal=causal)
    assert torch.equal(out, again), "the batch carries another plan than the kernel makes"
    assert len(out) == len(filled[0])
    expected = naive(q, k, v, queries, keys, causal=causal)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out[: len(q)], expected, atol=tolerance, rtol=tolerance)
    assert out.isfinite().all()


def test_one_sequence_on_the_cpu_is_not_copied() -> None:
    """Alone in float32, or with filler behind it in 16 bit: q, k and v as they are, or views."""
    rows = segments([21])
    for dtype, needed in ((torch.float32, 21), (torch.bfloat16, 32)):
        for count in (needed, needed + 16):
            all_of_them = None if count == needed else slice(0, needed)
            plan = planner(dtype, causal=False)(rows, rows, count, count)
            assert isinstance(plan, Plan)
            assert [alike.key_rows for alike in plan.groups] == [all_of_them]
            assert [alike.query_rows for alike in plan.groups] == [all_of_them]


def test_a_plan_serves_only_what_it_was_made_for() -> None:
    rows = segments([21, 4])
    q, k, v = random_heads(4, 2, rows, rows)
    planned = replace(rows, plan=planner(torch.float32, causal=False)(rows, rows, 25, 25))
    sdpa_by_length(q, k, v, planned, rows)
    with pytest.raises(AssertionError):
        sdpa_by_length(q, k, v, planned, rows, causal=True)
    with pytest.raises(AssertionError):
        sdpa_by_length(q.double(), k.double(), v.double(), planned, rows)


def test_a_long_causal_mask_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = segments([40, 33, 40]), segments([30, 33, 1])
    q, k, v = random_heads(4, 2, queries, keys)
    for rows in (1, 7, 16, 256):
        monkeypatch.setattr(cpu, "_BLOCK_ROWS", rows)
        out = sdpa_by_length(q, k, v, queries, keys, causal=True)
        expected = naive(q, k, v, queries, keys, causal=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [1, 5, 32, 33, 39, 40, 4096])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_a_sliding_window(
    kernel: AttentionKernel, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row sees itself and those before it, `window` in all; a lone query, too."""
    keys, queries = segments([40, 33, 40, 7]), segments([30, 33, 1, 7])
    q, k, v = random_heads(4, 2, queries, keys)
    if kernel is KERNELS["varlen, older torch"] and window < 40:
        with pytest.raises(UnsupportedError, match="no sliding window"):
            kernel(q, k, v, queries, keys, causal=True, window=window)
        return
    expected = naive(q, k, v, queries, keys, causal=True, window=window)
    for rows in (16, 256):
        monkeypatch.setattr(cpu, "_BLOCK_ROWS", rows)
        out = kernel(q, k, v, queries, keys, causal=True, window=window)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_a_sliding_window_where_lengths_are_rounded_up() -> None:
    keys, queries = segments([40, 33, 40, 7]), segments([30, 33, 1, 7])
    heads = random_heads(4, 2, queries, keys)
    for window in (5, 39):
        expected = naive(*heads, queries, keys, causal=True, window=window)
        rounded = (x.to(torch.bfloat16) for x in heads)
        out = sdpa_by_length(*rounded, queries, keys, causal=True, window=window)
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


def test_what_is_not_finite_stays_in_its_own_sequence() -> None:
    """Masked rows beyond a sequence's end are its own: -inf added to a NaN would be NaN."""
    lengths = [5, 20, 7, 33]
    bounds = np.cumsum([0, *lengths])
    for sick in range(4):
        heads = random_heads(4, 2, segments(lengths), segments(lengths))
        q, k, v = (x.to(torch.bfloat16) for x in heads)  # whose lengths are rounded up
        for x in (q, k, v):
            x[bounds[sick] : bounds[sick + 1]] = torch.nan
        out = sdpa_by_length(q, k, v, segments(lengths), segments(lengths))
        rows = [out[bounds[i] : bounds[i + 1]] for i in range(4)]
        assert [bool(part.isfinite().all()) for part in rows] == [i != sick for i in range(4)]
        assert rows[sick].isnan().all()
