from __future__ import annotations

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.batch import Encoding
from model.packing import pack, place

CPU = torch.device("cpu")


def encoding(length: int, pool_start: int = 0, first: int = 100) -> Encoding:
    return Encoding(np.arange(first, first + length, dtype=np.int32), pool_start)


def test_sequences_lie_end_to_end() -> None:
    batch = pack([encoding(3, 1), encoding(2, 0, first=7), encoding(4, 3, first=50)], CPU)
    assert batch.input_ids.tolist() == [100, 101, 102, 7, 8, 50, 51, 52, 53]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert batch.seqs.lengths == (3, 2, 4)
    assert batch.seqs.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert batch.seqs.max_seqlen == 4
    assert batch.pool_rows is not None
    assert batch.pool_rows.tolist() == [1, 2, 3, 4, 8]
    assert batch.pooled.lengths == (2, 2, 1)
    assert batch.pooled.cu_seqlens.tolist() == [0, 2, 4, 5]
    assert batch.pooled.max_seqlen == 2
    assert (batch.num_tokens, batch.num_seqs) == (9, 3)


def test_the_dtypes_are_what_the_kernels_take() -> None:
    batch = pack([encoding(3, 1), encoding(2)], CPU)
    assert batch.pool_rows is not None
    for tensor in (
        batch.input_ids,
        batch.positions,
        batch.seqs.cu_seqlens,
        batch.pooled.cu_seqlens,
        batch.pool_rows,
    ):
        assert tensor.dtype == torch.int32


def test_without_instructions_every_row_is_pooled() -> None:
    batch = pack([encoding(3), encoding(2)], CPU)
    assert batch.pool_rows is None
    assert batch.pooled is batch.seqs


def test_meta_tensors_run_through() -> None:
    batch = pack([encoding(3, 1), encoding(2)], torch.device("meta"))
    assert batch.pool_rows is not None
    assert {batch.input_ids.device.type, batch.seqs.cu_seqlens.device.type} == {"meta"}
    assert batch.pool_rows.shape == (4,)
    assert batch.pooled.lengths == (2, 2)


def test_the_upload_places_every_part_on_the_gpu() -> None:
    cuda = torch.device("cuda", 0)
    with FakeTensorMode():
        parts = place(torch.empty(9, dtype=torch.int32), [3, 2, 4], cuda)
    assert [tuple(part.shape) for part in parts] == [(3,), (2,), (4,)]
    assert {(part.device, part.dtype) for part in parts} == {(cuda, torch.int32)}


def test_filler_repeats_the_last_row_and_belongs_to_nobody() -> None:
    batch = pack([encoding(12, 1), encoding(7, 0, first=7)], CPU, filler=True)
    assert batch.input_ids.tolist() == [*range(100, 112), *range(7, 14), *[13] * 13]
    assert batch.positions.tolist() == [*range(12), *range(7), *[6] * 13]
    assert batch.seqs.lengths == (12, 7)
    assert batch.seqs.cu_seqlens.tolist() == [0, 12, 19]
    assert batch.pool_rows is not None
    assert batch.pool_rows.tolist() == [*range(1, 19), *[18] * 14]
    assert batch.pooled.lengths == (11, 7)


def test_filler_makes_few_sizes_and_is_an_eighth_at_most() -> None:
    sizes = {}
    for tokens in range(1, 2049):
        sizes[tokens] = pack([encoding(tokens)], CPU, filler=True).num_tokens
        assert tokens <= sizes[tokens] < tokens + max(16, tokens / 8)
    assert len(set(sizes.values())) == 16 + 3 * 8


def test_what_lies_between_two_rows() -> None:
    seqs = pack([encoding(3), encoding(2), encoding(4)], CPU).seqs
    for first, last, lengths in (
        (0, 9, (3, 2, 4)),
        (0, 4, (3, 1, 0)),
        (4, 8, (0, 1, 3)),
        (8, 12, (0, 0, 1)),  # filler behind the last one
        (9, 12, (0, 0, 0)),
    ):
        inside = seqs.between(first, last)
        assert inside.lengths == lengths
        assert inside.cu_seqlens.tolist() == np.cumsum([0, *lengths]).tolist()
        assert inside.cu_seqlens.dtype == torch.int32
        assert inside.max_seqlen == max(lengths)
